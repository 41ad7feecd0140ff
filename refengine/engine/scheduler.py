"""Plans which sequences compute which tokens in the next step: first come, first served, within a token budget.

Decoding sequences come first, with one token each. The rest of the budget goes to prompts in chunks, the oldest prompt
first, so a long prompt never delays decoding sequences by more than one budget. A waiting request is admitted when
there are free blocks for all of its ids, and never before an older one, so no request starves. If a running sequence
needs a block for its next token and none is free, the youngest sequence is preempted: its blocks are freed, and it is
recomputed later with the same tokens.
Independent of arrays, text and devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from refengine.cache.paged import KVCache, OutOfBlocks
from refengine.cache.prefix import PrefixCache
from refengine.engine.generation import Generation

# With this many positions before it, a token's attention takes about as long as everything else. Measured for
# gpt-oss-20b on an H100 in chunks of 512 tokens: 80 ms at position 0, and 2.2 ms more for each 1,000 positions.
DEEP = 32768
DEPTH_STEP = 4096


@dataclass(frozen=True)
class ScheduledChunk:
    """The ids of one request that a step computes.

    start: the position of the first id. draws: whether a token is sampled after the last id.
    n_scored: for this many ids, from the first, the log-probability of the following prompt id is needed.
    """

    generation: Generation
    ids: list[int]
    start: int
    draws: bool
    n_scored: int = 0

    @property
    def decodes(self) -> bool:
        """Whether it is a row of a decode step: one id that draws a token, with all positions before it cached."""
        return self.draws and len(self.ids) == 1 and self.start > 0


def affordable(budget: int, start: int) -> int:
    """The number of ids from position `start` on that take about as long as `budget` ids at the start of a prompt.

    So a chunk of a long prompt does not delay other sequences, or a cancellation, more than one of a short prompt.
    """
    if budget < 1:
        return 0
    return max(1, budget * DEEP // (DEEP + start // DEPTH_STEP * DEPTH_STEP))


class Scheduler:
    """Keeps the waiting and running requests, and plans steps.

    max_batch: the maximum number of running sequences.
    max_step_tokens, max_scored: the maximum number of ids in one step, and of ids that are scored in one step.
    preempt: preempt the youngest sequence if no block is free; False: the sequence that needs a block fails.
    """

    def __init__(
        self,
        cache: KVCache,
        prefix: PrefixCache | None,
        max_batch: int,
        max_step_tokens: int,
        preempt: bool,
        max_scored: int,
    ) -> None:
        self.cache, self.prefix = cache, prefix
        self.max_batch, self.max_step_tokens, self._preempt = max_batch, max_step_tokens, preempt
        self._max_scored = max_scored
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []  # the oldest first
        self.preemptions = 0

    def add(self, generation: Generation) -> None:
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Remove a request in any state and free its blocks. May be called repeatedly."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        if generation in self.running:
            self.running.remove(generation)
        self.cache.free(generation.progress.cached)

    def position(self, generation: Generation) -> int:
        """The request's place in the queue; 0 if it runs in the next step. A cached prefix may let it start earlier."""
        if generation not in self.waiting:
            return 0
        slots, blocks = self.max_batch - len(self.running), self.cache.pool.n_free + self.cache.pool.n_reclaimable
        for n_ahead, other in enumerate(self.waiting):
            slots, blocks = slots - 1, blocks - KVCache.blocks_for(len(other.ids), self.cache.block_size)
            if slots < 0 or blocks < 0:
                return self.waiting.index(generation) - n_ahead + 1
            if other is generation:
                break
        return 0

    def plan(self) -> tuple[list[ScheduledChunk], list[tuple[Generation, OutOfBlocks]]]:
        """The chunks of the next step, with their blocks reserved, and the requests that fail for lack of a block."""
        failed = self._make_room()
        self._admit()
        parts, budget = [], self.max_step_tokens
        for generation in self.running:
            if self._n_left(generation) == 1:
                parts.append(ScheduledChunk(generation, generation.ids[-1:], len(generation.ids) - 1, True))
                budget -= 1
        budget = max(budget, 1)  # prompts always make progress, even if decoding sequences use up the budget
        scored_budget = self._max_scored
        for generation in self.running:
            left = self._n_left(generation)
            if left == 1:
                continue
            start = generation.progress.cached.length
            n, n_scored = min(left, affordable(budget, start)), self._n_to_score(generation)
            if n_scored:
                n = n_scored = min(n, n_scored, scored_budget)
                scored_budget -= n_scored
            if n > 0:
                parts.append(ScheduledChunk(generation, generation.ids[start : start + n], start, n == left, n_scored))
                budget -= n
        return parts, failed

    def can_run_ahead(self, parts: Sequence[ScheduledChunk]) -> bool:
        """Whether the next step can be launched before the tokens of this one are known; reserves its blocks.

        It can if all sequences draw a token and will draw another, unless a token ends one of them early, and if no
        logits are to be read in between.
        """
        if len(parts) < len(self.running):
            return False
        for part in parts:
            generation = part.generation
            is_last = generation.n_generated + 1 >= generation.n_limit
            if not part.decodes or is_last or generation.params.logprobs is not None:
                return False
        try:
            self.cache.reserve([(part.generation.progress.cached, part.start + 2) for part in parts])
        except OutOfBlocks:
            return False
        return True

    def _make_room(self) -> list[tuple[Generation, OutOfBlocks]]:
        """Reserve a block for the next token of every running sequence, the oldest first; may preempt the youngest.

        Returns the requests that fail, with their errors.
        """
        failed = []
        needy = [g for g in self.running if self.cache.blocks_needed(g.progress.cached, len(g.ids))]
        for generation in needy:
            while generation in self.running:
                try:
                    self.cache.reserve([(generation.progress.cached, len(generation.ids))])
                    break
                except OutOfBlocks as e:
                    youngest = self.running[-1]
                    if self._preempt and len(self.running) > 1:
                        self._put_back(youngest)
                    else:
                        self.remove(generation)
                        failed.append((generation, e))
        return failed

    def _put_back(self, generation: Generation) -> None:
        """Preempt a running request: free its blocks and put it at the head of the queue."""
        self.running.remove(generation)
        self.cache.free(generation.progress.cached)
        generation.progress.prefix_keys.clear()
        generation.progress.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(generation)

    def _admit(self) -> None:
        """Move waiting requests to the running ones while there are slots and blocks for them."""
        while self.waiting and len(self.running) < self.max_batch:
            generation = self.waiting[0]
            sequence = generation.progress.cached
            prefix = None if generation.wants_scores else self.prefix
            cached = [] if prefix is None else prefix.match(generation.ids)
            sequence.block_table[:] = cached
            sequence.length = len(cached) * self.cache.block_size
            try:
                self.cache.reserve([(sequence, len(generation.ids))])
            except OutOfBlocks:
                sequence.block_table.clear()
                sequence.length = 0
                if prefix is not None:
                    prefix.unmatch(cached, len(generation.ids))
                return
            if generation.progress.preemptions == 0:
                generation.progress.prefix_tokens = sequence.length
            self.waiting.popleft()
            self.running.append(generation)

    @staticmethod
    def _n_to_score(generation: Generation) -> int:
        """The number of ids not computed yet that must be scored: those followed by another id of the prompt."""
        if not generation.wants_scores:
            return 0
        return max(0, generation.n_prompt - 1 - generation.progress.cached.length)

    @staticmethod
    def _n_left(generation: Generation) -> int:
        """The number of ids that are not computed yet."""
        return len(generation.ids) - generation.progress.cached.length
