"""The engine runs many sequences at once, on any device. They can start and end at any step (continuous batching).

    engine = Engine(model, EngineOptions(max_batch=8))
    seq = engine.start(ids, params)
    for token in engine.tokens(seq):  # or engine.next_token(seq), until its stop_reason is set
        print(token.text)
    engine.free(seq)

`step` advances all running sequences by one token; `next_token` calls it until its sequence has a token. All work is
done in the calling thread. Scheduling is in scheduler.py, the forward pass and sampling in runner.py. A sequence's
logits do not depend on the other sequences in the batch: bit for bit on kernels, up to rounding on arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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

DEFAULT_CACHE_TOKENS = 8192  # positions of the KV cache if the options do not give a number
DEFAULT_STEP_TOKENS = 512
CPU_STEP_TOKENS = 128  # On the CPU, 512 tokens take 0.1 s even on a small model; shorter steps are no slower in total.
SCORED_ROWS = 64  # maximum number of prompt tokens whose log-probabilities are computed in one step
SCORED_LOGITS = 1 << 22  # maximum number of their logits; the host takes 10 ns for each


@dataclass(frozen=True)
class EngineOptions:
    """The options of an engine; each feature can be disabled on its own. Raises RequestError for numbers out of range.

    max_batch:       the maximum number of sequences that run at the same time; others wait in the queue.
    max_step_tokens: the maximum number of tokens in one step, over all sequences.
    cache_tokens:    the positions of the KV cache (default: enough for max_batch sequences with full context, but at
                     most DEFAULT_CACHE_TOKENS).
    prefix_cache:    keep full KV cache blocks and reuse them for prompts with the same beginning.
    batching:        False runs one sequence at a time.
    on_shortage:     what to do if a running sequence needs a block and none is free: `preempt` frees the youngest
                     sequence's blocks and recomputes it later; `fail` ends the sequence with an error.
    graphs:          on a GPU, capture the decode step as a CUDA graph for each bucket of rows, and replay it; prepare
                     the launches of prompts once for each number of rows.
    ahead:           on kernels, launch a decode step before the tokens of the one before are read, while the same
                     sequences continue.
    """

    max_batch: int = 8
    max_step_tokens: int = DEFAULT_STEP_TOKENS
    cache_tokens: int | None = None
    prefix_cache: bool = True
    batching: bool = True
    on_shortage: str = "preempt"
    graphs: bool = True
    ahead: bool = True

    @property
    def n_running(self) -> int:
        """The maximum number of sequences that run at the same time."""
        return self.max_batch if self.batching else 1

    def __post_init__(self) -> None:
        for name, low, high in (("max_batch", 1, 1024), ("max_step_tokens", 1, 1 << 20)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"{name}: given {value}, allowed {low} to {high}")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise RequestError(f"cache_tokens: given {self.cache_tokens}, allowed 1 or more")
        if self.on_shortage not in ("preempt", "fail"):
            raise RequestError(f"on_shortage: given {self.on_shortage!r}, allowed preempt or fail")


class Engine:
    """Runs requests on one model. hook: its methods are called at events. trace: gets every tensor of every step."""

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
        # The fused decode step of a model's own runner cannot be traced; the model file can.
        make_runner = model.make_runner if trace is no_trace and model.make_runner else ArrayRunner
        self.runner: Runner = make_runner(model, self.cache, max_batch, self.options.graphs, trace)
        self._ahead = self.options.ahead and self.runner.can_run_ahead

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile and allocate in advance: run the longest possible chunk of a prompt, and every decode bucket.

        progress: called with (kernels compiled, total) while kernels of this model are compiled.
        """
        room = self.cache.pool.n_blocks * self.cache.block_size
        self.runner.warm_up(min(self.options.max_step_tokens, self.model.n_ctx - 1, room), progress)

    @property
    def idle(self) -> bool:
        """Whether no sequence runs or waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    @property
    def prefix_stats(self) -> PrefixStats:
        """The statistics of the prefix cache; zeros if there is none."""
        return PrefixStats() if self.prefix is None else self.prefix.stats

    def stats(self) -> EngineStats:
        """The current numbers of sequences and blocks, and the counters."""
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
        """Add a request with a prompt of token ids. It runs from the next step on, or waits in the queue.

        Raises RequestError for a prompt that is empty, has ids outside the vocabulary, fills the context, or can never
        fit into the KV cache; and for parameters that do not fit the model.
        """
        params = params or SamplingParams()
        n_limit = checked_limit(self.model, ids, params)
        needed = KVCache.blocks_for(len(ids) + n_limit, self.cache.block_size)
        if needed > self.cache.pool.n_blocks:
            raise RequestError(
                f"{len(ids)} prompt tokens and {n_limit} more need {needed} blocks of {self.cache.block_size}, but the "
                f"KV cache has {self.cache.pool.n_blocks}: reduce max_tokens or increase cache_tokens",
                "prompt",
            )
        generation = Generation(ids, params, n_limit, self.model.vocabulary)
        self.scheduler.add(generation)
        self.hook.on_start(generation)
        return generation

    def queue_position(self, generation: Generation) -> int:
        """The request's place in the queue; 0 if it runs now or will run in the next step."""
        return self.scheduler.position(generation)

    def fork(self, generation: Generation, params: SamplingParams | None = None) -> Generation:
        """A second sequence that continues from the current state of this one. They share blocks until one writes.

        Raises RequestError for a sequence that has ended.
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
        """The sequence's next token. Other sequences advance too; their tokens stay in `pending`.

        Raises the error that ended the sequence, and RequestError if it has ended otherwise or was freed.
        """
        while not generation.pending:
            if generation.error is not None:
                raise generation.error
            if generation.end is not None:
                raise RequestError(f"this sequence has ended ({generation.end}): it has no next token")
            self.step()
        return generation.pending.popleft()

    def tokens(self, generation: Generation) -> Iterator[Token]:
        """Yields the sequence's tokens until it ends, each computed on demand. Raises the errors of `next_token`."""
        while generation.end is None or generation.pending or generation.error is not None:
            yield self.next_token(generation)

    def step(self) -> list[Generation]:
        """Advance every decoding sequence by one token, and prompts by up to max_step_tokens.

        Returns the sequences that got a token or ended.
        """
        start = time.perf_counter()
        parts, failed = self.scheduler.plan()
        for generation, error in failed:
            self._fail(generation, error)
        if not parts:
            return [generation for generation, _ in failed]
        prefill_tokens = sum(len(part.ids) for part in parts if not part.decodes)
        results = self.runner.run(parts, self._ahead and self.scheduler.can_run_ahead(parts))
        self.cache.commit([(part.generation.progress.cached, part.ids) for part in parts])
        seconds = time.perf_counter() - start
        self._register(parts)
        changed = [generation for generation, _ in failed]
        for part, result in zip(parts, results, strict=True):
            generation = part.generation
            if not generation.n_generated:
                generation.prefill_s += seconds
            if result.error is not None:
                self._fail(generation, result.error)
            for position, score in enumerate(result.prompt_scores, part.start + 1):
                generation.prompt_scores[position] = score
            if result.token is not None:
                self._accept(generation, result.token, result.score)
            if part.draws or result.error is not None:
                changed.append(generation)
        batch_size = sum(part.draws for part in parts)
        self.hook.on_step(StepStats(self.stats(), batch_size, prefill_tokens, seconds))
        return changed

    def wait(self) -> None:
        """Wait until nothing runs on the device any more: a step may have been launched ahead."""
        self.runner.wait()

    def cancel(self, generation: Generation) -> None:
        """End a sequence at once, whether it waits, prefills or decodes, and free its blocks."""
        self.scheduler.remove(generation)
        self._ended(generation, "cancelled")

    def free(self, generation: Generation) -> None:
        """Cancel a sequence that is no longer needed, and drop its pending tokens."""
        self.cancel(generation)
        generation.pending.clear()

    def abort(self, error: RefengineError) -> list[Generation]:
        """End all running sequences with an error, because their step failed. Returns them. Waiting ones stay."""
        ended = list(self.scheduler.running)
        for generation in ended:
            self._fail(generation, error)
        if self.prefix is not None:
            self.prefix.clear()  # blocks may be half written
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
    """The default of max_step_tokens for a device."""
    return CPU_STEP_TOKENS if device == "cpu" else DEFAULT_STEP_TOKENS


def default_cache_tokens(max_batch: int, n_ctx: int) -> int:
    """The default of cache_tokens: the positions of the KV cache."""
    return min(max_batch * n_ctx, DEFAULT_CACHE_TOKENS)


def checked_limit(model: Any, ids: Sequence[int], params: SamplingParams) -> int:
    """The maximum number of tokens to generate. Raises RequestError if the prompt or params do not fit the model."""
    model.check_ids(ids)
    if len(ids) >= model.n_ctx:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and fills the context of {model.n_ctx} tokens: nothing can be generated",
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
    ahead: bool = True,
) -> tuple[Engine, Generation]:
    """An engine with a cache just large enough for one sequence, and that sequence.

    chunk: the maximum number of prompt tokens in a forward pass. Raises the errors of `Engine.start`.
    """
    params = params or SamplingParams()
    n_tokens = len(ids) + checked_limit(model, ids, params)
    model.check_trace(trace)
    options = EngineOptions(1, chunk, n_tokens, prefix_cache=False, graphs=graphs, ahead=ahead)
    engine = Engine(model, options, trace=trace)
    engine.runner.warm_up(0)  # The only prompt follows at once, so warming up with a prompt would gain nothing.
    return engine, engine.start(ids, params)
