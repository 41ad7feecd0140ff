"""The engine: sequences that join, advance by one token a step, and leave; on any device.

    engine = Engine(model, EngineOptions(max_batch=8))
    seq = engine.start(ids, params)
    for token in engine.tokens(seq):  # or engine.next_token(seq), until its stop_reason is set
        print(token.text)
    engine.free(seq)

`step` advances all running sequences at once; `next_token` calls it until its sequence has a token. Everything is done
in the thread that calls. Scheduling is in scheduler.py, the forward pass and the draws in runner.py. A sequence's
tokens do not depend on what runs beside it: on kernels bit for bit, on arrays up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refengine.cache.paged import KVCache
from refengine.cache.prefix import PrefixCache, PrefixStats
from refengine.engine.generation import Generation, Score, Token
from refengine.engine.hooks import EngineStats, MetricsHook, StepStats
from refengine.engine.runner import ArrayRunner, Runner
from refengine.engine.sampling import SamplingParams
from refengine.engine.scheduler import ScheduledChunk, Scheduler
from refengine.errors import RefengineError, RequestError
from refengine.trace import Tracer, no_trace

DEFAULT_CACHE_TOKENS = 8192  # positions of the KV cache where the options leave it open
DEFAULT_STEP_TOKENS = 512
CPU_STEP_TOKENS = 128  # A step of 512 takes 0.1 s there even for a small model, and shorter ones are no slower in all.
SCORED_ROWS = 64  # of prompts in one step, at most
SCORED_LOGITS = 1 << 22  # the same: the host takes 10 ns for each


@dataclass(frozen=True)
class EngineOptions:
    """Each feature by itself. Raises RequestError for numbers out of range.

    max_batch:       sequences that run together; the others wait. batching=False: one after the other.
    max_step_tokens: ids in one step, over all sequences.
    cache_tokens:    positions of the KV cache (default: what max_batch sequences of the whole context need, at most
                     DEFAULT_CACHE_TOKENS).
    prefix_cache:    keep full blocks for prompts that begin alike.
    on_shortage:     `preempt` computes the youngest sequence again later; `fail` ends the one that finds no block.
    graphs:          on a GPU, capture the decode step once for each bucket of rows and replay it.
    """

    max_batch: int = 8
    max_step_tokens: int = DEFAULT_STEP_TOKENS
    cache_tokens: int | None = None
    prefix_cache: bool = True
    batching: bool = True
    on_shortage: str = "preempt"
    graphs: bool = True

    @property
    def n_running(self) -> int:
        """How many sequences may run together."""
        return self.max_batch if self.batching else 1

    def __post_init__(self) -> None:
        for name, low, high in (("max_batch", 1, 1024), ("max_step_tokens", 1, 1 << 20)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"{name}: given {value}, allowed {low} to {high}")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise RequestError(f"cache_tokens: given {self.cache_tokens}, allowed 1 and more")
        if self.on_shortage not in ("preempt", "fail"):
            raise RequestError(f"on_shortage: given {self.on_shortage!r}, allowed preempt or fail")


class Engine:
    """One model's requests. hook: told what happens. trace: sees every tensor of every step."""

    def __init__(
        self,
        model: Any,
        options: EngineOptions | None = None,
        hook: MetricsHook | None = None,
        trace: Tracer = no_trace,
    ) -> None:
        self.model, self.options, self.hook = model, options or EngineOptions(), hook or MetricsHook()
        self.max_batch = max_batch = self.options.n_running
        n_tokens = self.options.cache_tokens
        if n_tokens is None:
            n_tokens = default_cache_tokens(max_batch, model.n_ctx)
        self.cache: KVCache = model.new_cache(n_tokens)
        self.prefix = None
        if self.options.prefix_cache:
            self.prefix = PrefixCache(self.cache.pool, self.cache.block_size, f"{id(model)}")
        self.scheduler = Scheduler(
            self.cache,
            self.prefix,
            max_batch,
            self.options.max_step_tokens,
            self.options.on_shortage == "preempt",
            max(1, min(SCORED_ROWS, SCORED_LOGITS // model.config.n_vocab)),
        )
        # Only the model file shows its tensors to a trace, whatever the model's own runner does.
        make_runner = model.make_runner if trace is no_trace and model.make_runner else ArrayRunner
        self.runner: Runner = make_runner(model, self.cache, max_batch, self.options.graphs, trace)

    def warm_up(self) -> None:
        """Compile and allocate what the first requests would wait for: the longest part of a prompt, every bucket."""
        room = self.cache.pool.n_blocks * self.cache.block_size
        self.runner.warm_up(min(self.options.max_step_tokens, self.model.n_ctx - 1, room))

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    @property
    def prefix_stats(self) -> PrefixStats:
        """Zeros where there is no prefix cache."""
        return PrefixStats() if self.prefix is None else self.prefix.stats

    def stats(self) -> EngineStats:
        """What the engine holds right now."""
        pool, stats, scheduler = self.cache.pool, self.prefix_stats, self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=pool.n_used,
            blocks_cached=pool.n_reclaimable,
            blocks_free=pool.n_free,
            prefix_hits=stats.hits,
            prefix_misses=stats.misses,
            preemptions=scheduler.preemptions,
        )

    def start(self, ids: Sequence[int], params: SamplingParams | None = None) -> Generation:
        """Take in a prompt; it runs from the next step on, or waits for its turn.

        Raises RequestError for a prompt that is empty, out of the vocabulary, fills the context, or could never have
        room in the cache; and for parameters that do not fit the model.
        """
        params = params or SamplingParams()
        n_limit = checked_limit(self.model, ids, params)
        needed = KVCache.blocks_for(len(ids) + n_limit, self.cache.block_size)
        if needed > self.cache.pool.n_blocks:
            raise RequestError(
                f"{len(ids)} prompt tokens and {n_limit} more need {needed} blocks of {self.cache.block_size}, the KV "
                f"cache has {self.cache.pool.n_blocks}: ask for fewer (max_tokens) or give it more (cache_tokens)",
                "prompt",
            )
        generation = Generation(ids, params, n_limit, self.model.vocabulary)
        self.scheduler.add(generation)
        self.hook.on_start(generation)
        return generation

    def queue_position(self, generation: Generation) -> int:
        """0: it runs now, or from the next step on; else its place among those that wait for a sequence or blocks."""
        return self.scheduler.position(generation)

    def fork(self, generation: Generation, params: SamplingParams | None = None) -> Generation:
        """Another sequence that goes on from where this one is, in the same blocks until one of them writes.

        Raises RequestError for one that has ended.
        """
        if generation.end is not None:
            raise RequestError(f"a sequence that has ended ({generation.end}) cannot be forked")
        other = generation.forked(params or generation.params)
        scheduler = self.scheduler
        if generation in scheduler.running and len(scheduler.running) < scheduler.max_batch:
            other.progress.cached = self.cache.fork(generation.progress.cached)
            other.progress.prefix_keys = list(generation.progress.prefix_keys)
            scheduler.running.append(other)
        else:
            scheduler.add(other)
        self.hook.on_start(other)
        return other

    def next_token(self, generation: Generation) -> Token:
        """The sequence's next token; the others advance too, and keep theirs.

        Raises what ended the sequence with `error`; RequestError where it has ended otherwise, or was freed.
        """
        while not generation.pending:
            if generation.error is not None:
                raise generation.error
            if generation.end is not None:
                raise RequestError(f"this sequence has ended ({generation.end}): it has no next token")
            self.step()
        return generation.pending.popleft()

    def tokens(self, generation: Generation) -> Iterator[Token]:
        """The sequence's tokens to its last one, each computed when it is asked for. Raises as `next_token`."""
        while generation.end is None or generation.pending or generation.error is not None:
            yield self.next_token(generation)

    def step(self) -> list[Generation]:
        """Advance every running sequence by one token, prompts by up to a budget; those that got a token, or ended."""
        start = time.perf_counter()
        parts, failed = self.scheduler.plan()
        for generation, error in failed:
            self._fail(generation, error)
        if not parts:
            return [generation for generation, _ in failed]
        prefill_tokens = sum(len(part.ids) for part in parts if not part.decodes)
        results = self.runner.run(parts)
        self.cache.commit([(part.generation.progress.cached, part.ids) for part in parts])
        seconds = time.perf_counter() - start
        self._register(parts)
        for part in parts:
            generation = part.generation
            if generation.n_generated:
                generation.decode_s += seconds
            else:
                generation.prefill_s += seconds
        moved = [generation for generation, _ in failed]
        for part, result in zip(parts, results, strict=True):
            generation = part.generation
            if result.error is not None:
                self._fail(generation, result.error)
            for position, score in enumerate(result.prompt_scores, part.start + 1):
                generation.prompt_scores[position] = score
            if result.token is not None:
                self._accept(generation, result.token, result.score)
            if part.draws or result.error is not None:
                moved.append(generation)
        batch_size = sum(part.draws for part in parts)
        self.hook.on_step(StepStats(self.stats(), batch_size, prefill_tokens, seconds))
        return moved

    def cancel(self, generation: Generation) -> None:
        """End a sequence now, in the queue, in prefill or while it decodes; its blocks are free at once."""
        self.scheduler.remove(generation)
        self._ended(generation, "cancelled")

    def free(self, generation: Generation) -> None:
        """Done with a sequence: as `cancel`, and tokens that were not asked for are dropped."""
        self.cancel(generation)
        generation.pending.clear()

    def abort(self, error: RefengineError) -> list[Generation]:
        """End what runs with an error (the device failed in the middle of its step), not what waits; what was ended."""
        ended = list(self.scheduler.running)
        for generation in ended:
            self._fail(generation, error)
        if self.prefix is not None:
            self.prefix.clear()  # what was half written is not to be trusted
        return ended

    def _accept(self, generation: Generation, token_id: int, score: Score | None) -> None:
        now = time.perf_counter()
        token = generation.accept(token_id, score)
        if generation.first_token_s is None:
            generation.first_token_s = now - generation.started
            self.hook.on_first_token(generation, generation.first_token_s)
        self.hook.on_token(generation, token, now - generation.last_token)
        generation.last_token = now
        if token.stop_reason is not None:
            self.scheduler.remove(generation)
            self.hook.on_end(generation, token.stop_reason)

    def _fail(self, generation: Generation, error: RefengineError) -> None:
        self.scheduler.remove(generation)
        generation.error = error
        self._ended(generation, "error")

    def _ended(self, generation: Generation, reason: str) -> None:
        if generation.end is None:
            generation.end = reason
            self.hook.on_end(generation, reason)

    def _register(self, parts: Sequence[ScheduledChunk]) -> None:
        if self.prefix is None:
            return
        for part in parts:
            progress = part.generation.progress
            length = progress.cached.length
            if length // self.cache.block_size > len(progress.prefix_keys):  # a block has become full
                known = part.generation.ids[:length]
                self.prefix.register(known, progress.cached.block_table, progress.prefix_keys)


def default_step_tokens(device: str) -> int:
    """Ids in one step on a device of this name, where the options leave it open."""
    return CPU_STEP_TOKENS if device == "cpu" else DEFAULT_STEP_TOKENS


def default_cache_tokens(max_batch: int, n_ctx: int) -> int:
    """Positions of the KV cache where the options leave it open."""
    return min(max_batch * n_ctx, DEFAULT_CACHE_TOKENS)


def checked_limit(model: Any, ids: Sequence[int], params: SamplingParams) -> int:
    """How many tokens may follow the prompt. Raises RequestError for what does not fit the model."""
    model.check_ids(ids)
    if len(ids) >= model.n_ctx:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and fills the context of {model.n_ctx}: no room for an answer",
            "prompt",
        )
    tokenizer = model.vocabulary
    params.check_for_model(
        model.config.n_vocab, lambda text: len(tokenizer.encode(text, add_special=False)) if tokenizer else 0
    )
    if params.stop and tokenizer is None:
        raise RequestError("stop strings need a vocabulary, and this model has none", "stop")
    return int(min(params.max_tokens, model.n_ctx - len(ids)))


def single_sequence(
    model: Any,
    ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    chunk: int = 512,
    trace: Tracer = no_trace,
    graphs: bool = True,
) -> tuple[Engine, Generation]:
    """An engine whose cache is just large enough for one sequence, and that sequence. Raises as `Engine.start`."""
    params = params or SamplingParams()
    n_tokens = len(ids) + checked_limit(model, ids, params)
    model.check_trace(trace)
    options = EngineOptions(1, chunk, n_tokens, prefix_cache=False, graphs=graphs)
    engine = Engine(model, options, trace=trace)
    engine.runner.warm_up(0)  # The only prompt follows at once, so nothing is gained by a prompt of zeros before it.
    return engine, engine.start(ids, params)
