"""Who computes what in the next step: first come, first served, within a batch and a budget of tokens.

Running sequences come first, one token each; what is left of the budget goes to prompts, the oldest first, in chunks,
so that a long prompt never holds up running streams for more than one budget. A waiting request is admitted when the
blocks for all of its ids are there, never past one that came before it: none starves. Where a running sequence finds no
block for its next token, the youngest is preempted: its blocks are freed, it is computed again later, and the same
tokens come out.
Knows the cache's arithmetic; nothing of arrays, text and devices.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from refengine.cache.paged import KVCache, OutOfBlocks
from refengine.cache.prefix import PrefixCache
from refengine.engine.generation import Generation

# Attention to so many positions takes a token about as long as all else: gpt-oss-20b on an H100, 512 tokens at a time,
# 80 ms at position 0 and 2.2 ms more for each 1,000 before them.
DEEP = 32768
DEPTH_STEP = 4096


@dataclass(frozen=True)
class ScheduledChunk:
    """Ids of one request to feed in a step.

    start: position of the first. draws: whether a token is drawn after them. n_scored: of how many ids, from the first,
    the log-probability of the next id of the prompt is wanted.
    """

    generation: Generation
    ids: list[int]
    start: int
    draws: bool
    n_scored: int = 0

    @property
    def decodes(self) -> bool:
        """One id, whose token is wanted, behind positions that are all in the cache: a decode step's row."""
        return self.draws and len(self.ids) == 1 and self.start > 0


def affordable(budget: int, start: int) -> int:
    """How many ids from position `start` on take about as long as `budget` of them at the start of a prompt.

    So the longest prompt holds up others, and hears of its end, no later than a short one does.
    """
    if budget < 1:
        return 0
    return max(1, budget * DEEP // (DEEP + start // DEPTH_STEP * DEPTH_STEP))


class Scheduler:
    """max_batch: sequences that run together. max_step_tokens, max_scored: ids in one step, and of them those that are
    scored. preempt: else who finds no block fails."""

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
        """Forget a request and free its blocks, whatever its state. Harmless when repeated."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        if generation in self.running:
            self.running.remove(generation)
        self.cache.free(generation.progress.cached)

    def position(self, generation: Generation) -> int:
        """0: it runs in the next step; else its place in the queue then. A prefix that is cached may better it."""
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
        """The parts of the next step, their blocks reserved; and requests that no block was left for."""
        failed = self._make_room()
        self._admit()
        parts, budget = [], self.max_step_tokens
        for generation in self.running:
            if self._n_left(generation) == 1:
                parts.append(ScheduledChunk(generation, generation.ids[-1:], len(generation.ids) - 1, True))
                budget -= 1
        budget = max(budget, 1)  # however many decode, prompts go on
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

    def _make_room(self) -> list[tuple[Generation, OutOfBlocks]]:
        """A block for the next token of every running sequence, the oldest first; the youngest make way."""
        failed = []
        for generation in list(self.running):
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
        """Free the blocks of a running request, to be computed again before any that waits."""
        self.running.remove(generation)
        self.cache.free(generation.progress.cached)
        generation.progress.prefix_keys.clear()
        generation.progress.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(generation)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            generation = self.waiting[0]
            sequence = generation.progress.cached
            prefix = None if generation.wants_scores else self.prefix
            found = [] if prefix is None else prefix.match(generation.ids)
            sequence.block_table[:] = found
            sequence.length = len(found) * self.cache.block_size
            try:
                self.cache.reserve([(sequence, len(generation.ids))])
            except OutOfBlocks:
                sequence.block_table.clear()
                sequence.length = 0
                if prefix is not None:
                    prefix.unmatch(found, len(generation.ids))
                return
            if generation.progress.preemptions == 0:
                generation.progress.prefix_tokens = sequence.length
            self.waiting.popleft()
            self.running.append(generation)

    @staticmethod
    def _n_to_score(generation: Generation) -> int:
        """How many ids that are still to be fed have a next one in a prompt whose log-probabilities are wanted."""
        if not generation.wants_scores:
            return 0
        return max(0, generation.n_prompt - 1 - generation.progress.cached.length)

    @staticmethod
    def _n_left(generation: Generation) -> int:
        return len(generation.ids) - generation.progress.cached.length
