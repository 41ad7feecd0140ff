"""Runs steps on raw kernels: decodes and computes prompts with fused operations, samples on the device.

Gives the same bits as `model.evaluate` for all rows together. Independent of scheduling and text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from refengine.cache.paged import BLOCK_SIZE, CacheSequence, KVCache
from refengine.config import ModelConfig
from refengine.cuda.decode.prompt import PromptPass
from refengine.cuda.decode.step import DecodeRow, DecodeStep, NoFusedStep, StepPlan
from refengine.cuda.runtime.launch import NoLaunches
from refengine.cuda.sampling import checked_token, sample_rows
from refengine.cuda.workspace import prompt_bytes as forward_bytes
from refengine.engine.runner import Result, n_rows, result_of, wanted_rows
from refengine.engine.sampling import SamplingParams
from refengine.engine.scheduler import ScheduledChunk
from refengine.trace import Tracer, no_trace, to_numpy

log = logging.getLogger(__name__)


class KernelRunner:
    """The runner for kernels. An engine with a trace uses `ArrayRunner`, because the fused step cannot be traced.

    max_batch: the maximum number of rows of the fused step.
    graphs: capture the fused step as a graph for each bucket, and prepare the launches of prompts; False launches
    kernels one by one.
    """

    def __init__(self, model: Any, cache: KVCache, max_batch: int, graphs: bool, trace: Tracer = no_trace) -> None:
        assert trace is no_trace, "the fused step has no tensors to trace"
        self._model, self._cache, self._max_batch = model, cache, max_batch
        self._step: DecodeStep | None = None  # the fused step
        self._prompts: PromptPass | None = None
        if model.ops.attention_by == "flash":
            given = (model.ops, model.config, model.decode, model.weights, cache)
            try:
                self._step = step = DecodeStep(*given, max_batch=max_batch, graphs=graphs)
                self._prompts = PromptPass(*given, step.n_positions, step.angles, prepared=graphs)
            except NoFusedStep as e:
                log.warning("tokens of %s go through forward(), without a fused step: %s", model.config.arch, e)
        self.can_run_ahead = self._step is not None

    def warm_up(self, n_prompt: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the kernels and capture the graphs; allocate the arrays for a prompt of `n_prompt` tokens."""
        if self._step is not None:
            self._step.warm_up(progress)
        if n_prompt and self._prompts is not None:
            self._prompts.prepare(n_prompt, self._max_batch)
        if n_prompt:
            sequence = CacheSequence()
            self._logits([(sequence, [0] * n_prompt)], [n_prompt - 1])
            self._cache.free(sequence)
            self._use_most(n_prompt)
            self._model.ops.memory.settle()

    def replay_step(self, n: int) -> Callable[[], None]:
        """`DecodeStep.replay`. Raises NoFusedStep if the model has no fused step."""
        if self._step is None:
            raise NoFusedStep("there is no fused step to replay")
        return self._step.replay(n)

    def _use_most(self, n_prompt: int) -> None:
        """Take as much from the pool as any later pass: inputs of n_prompt rows, draws with the longest histories."""
        if self._step is None or self._prompts is None:
            return
        ops, n = self._model.ops, self._max_batch
        params, history = SamplingParams(temperature=1.0, repetition_penalty=2.0), [0] * self._step.n_positions
        with ops.workspace():
            inputs = self._prompts.most_inputs(n_prompt, n)
            logits, space = self._step.logits_space[:n], self._step.sampling_space
            sample_rows(ops.xp, ops.kernels, logits, [params] * n, [history] * n, [0] * n, [0] * n, space)
            del inputs  # held until now, because a prompt's are when its tokens are drawn

    def wait(self) -> None:
        """See `Runner.wait`."""
        if self._step is not None:
            self._step.wait()

    def run(self, parts: Sequence[ScheduledChunk], ahead: bool = False) -> list[Result]:
        """See `Runner.run`."""
        decoding = [] if self._step is None else [part for part in parts if part.decodes]
        others = list(parts) if self._step is None else [part for part in parts if not part.decodes]
        results: dict[int, Result] = {}
        if decoding:
            assert self._step is not None
            drawn, logits = self._step.run([row_of(part) for part in decoding], ahead=ahead)
            results = self._results(decoding, drawn.tolist(), logits)
        if others:
            inputs = [(part.generation.progress.cached, part.ids) for part in others]
            logits = self._logits(inputs, wanted_rows(others))
            results |= self._results(others, self._draw(others, logits), logits)
        return [results[id(part)] for part in parts]

    def _logits(self, parts: Sequence[tuple[CacheSequence, Sequence[int]]], rows: Sequence[int]) -> Any:
        """Logits on the device of these rows of prompts: sequences with the ids to append to each."""
        if self._prompts is None:
            return self._model.evaluate(parts, self._cache, rows)
        return self._prompts.run(self._cache.batch(parts, rows))

    def _draw(self, parts: Sequence[ScheduledChunk], logits: Any) -> list[list[int]]:
        """Sample on the device for the parts that draw a token; the result has one row for each, see `sample_rows`."""
        drawing = [part.generation for part in parts if part.draws]
        if not drawing:
            return []
        ops = self._model.ops
        with ops.workspace():
            if len(drawing) < len(logits):  # the other rows are only scored
                ends = np.cumsum([n_rows(part) for part in parts]) - 1
                logits = logits[ops.xp.asarray([end for part, end in zip(parts, ends, strict=True) if part.draws])]
            drawn = sample_rows(
                ops.xp,
                ops.kernels,
                logits,
                [g.params for g in drawing],
                [g.ids for g in drawing],
                [g.seed for g in drawing],
                [g.n_generated for g in drawing],
                None if self._step is None else self._step.sampling_space,
            )
        drawn_rows: list[list[int]] = to_numpy(drawn).tolist()
        return drawn_rows

    @staticmethod
    def _results(parts: Sequence[ScheduledChunk], drawn: Sequence[Sequence[int]], logits: Any) -> dict[int, Result]:
        """The results by id(part). Logits are copied to the host only if log-probabilities were requested."""
        results, n_seen, rest = {}, 0, iter(drawn)
        for part in parts:
            n = n_rows(part)
            has_logprobs = part.n_scored or part.generation.params.logprobs is not None
            rows: Any = to_numpy(logits[n_seen : n_seen + n]) if has_logprobs else ()
            draw = partial(checked_token, next(rest)) if part.draws else None
            results[id(part)] = result_of(part, rows, draw)
            n_seen += n
        return results


def step_bytes(
    config: ModelConfig, decode: Any, weights: Any, place: str, attention_by: str, max_batch: int, n_positions: int
) -> int:
    """The bytes of device memory that the fused step needs in addition to weights and cache; 0 without a fused step.

    weights: only names, types and shapes are used. n_positions: the smaller of the context length and the cache's size.
    """
    if attention_by != "flash":
        return 0
    sizes = {"max_batch": max_batch, "n_ctx": config.n_ctx_train, "n_positions": n_positions, "block_size": BLOCK_SIZE}
    try:
        return StepPlan.of(decode, config, weights, NoLaunches(place), **sizes).total_bytes
    except NoFusedStep:
        return 0


def prompt_bytes(
    config: ModelConfig,
    decode: Any,
    weights: Any,
    place: str,
    attention_by: str,
    max_batch: int,
    n_tokens: int,
    n_positions: int,
) -> int:
    """The bytes of device memory that prompts need, in passes of up to n_tokens, in which up to max_batch prompts end.

    Other arguments: see `step_bytes`.
    """
    if attention_by == "flash":
        sizes = {"n_ctx": config.n_ctx_train, "n_positions": n_positions, "block_size": BLOCK_SIZE}
        try:
            return PromptPass.planned_bytes(config, decode, weights, place, n_tokens, max_batch, **sizes)
        except NoFusedStep:
            pass
    return forward_bytes(config, n_tokens)


def row_of(part: ScheduledChunk) -> DecodeRow:
    """The row of a decode step. A sequence that was preempted has a new key: other sequences have had its blocks."""
    g = part.generation
    progress = g.progress
    return DecodeRow(
        key=(g, progress.preemptions),
        token=part.ids[0],
        position=part.start,
        block_table=progress.cached.block_table,
        params=g.params,
        seed=g.seed,
        index=g.n_generated,
        history=g.ids,
    )
