"""Runs a step's forward pass and samples its tokens, on array code or kernels. Independent of scheduling and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from refengine.cache.paged import KVCache
from refengine.engine.generation import Score
from refengine.engine.sampling import logprobs, sample
from refengine.engine.scheduler import ScheduledChunk
from refengine.errors import RefengineError
from refengine.trace import Tracer, no_trace, to_numpy


@dataclass(frozen=True)
class Result:
    """The result of one scheduled chunk.

    token: the sampled id, or None if the chunk draws none. score: its log-probability, if requested.
    prompt_scores: for each scored id of the chunk, the score of the id that follows it.
    error: why there is no result.
    """

    token: int | None = None
    score: Score | None = None
    prompt_scores: tuple[Score, ...] = ()
    error: RefengineError | None = None


class Runner(Protocol):
    """Computes the chunks of a step. can_run_ahead: whether `ahead` has an effect."""

    can_run_ahead: bool

    def run(self, parts: Sequence[ScheduledChunk], ahead: bool = False) -> list[Result]:
        """Feed the chunks to the model; returns one result for each, in order.

        ahead: all chunks decode, need no logits, and have blocks for one more position: before the results are read,
        launch the step that feeds the tokens they draw. The next call uses its results for those of its chunks that
        are of the same sequences; nothing remains of the others.
        """

    def wait(self) -> None:
        """Wait until nothing runs on the device. A step that was launched ahead is dropped."""

    def warm_up(self, n_prompt: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile and allocate in advance, also with a prompt of `n_prompt` tokens unless it is 0.

        progress: called with (kernels compiled, total).
        """


def wanted_rows(parts: Sequence[ScheduledChunk]) -> list[int]:
    """The batch rows whose logits are needed: for each part the scored rows, then the row it draws from."""
    rows: list[int] = []
    start = 0
    for part in parts:
        rows += range(start, start + part.n_scored)
        start += len(part.ids)
        if part.draws:
            rows.append(start - 1)
    return rows


def n_rows(part: ScheduledChunk) -> int:
    """The number of rows of `wanted_rows` that belong to a part."""
    return part.n_scored + part.draws


class ArrayRunner:
    """Computes all chunks in one call of `model.evaluate` and samples on the host. Works on every device and profile.

    max_batch and graphs are not used; all runners have the same constructor arguments.
    """

    can_run_ahead = False

    def __init__(
        self, model: Any, cache: KVCache, max_batch: int = 1, graphs: bool = False, trace: Tracer = no_trace
    ) -> None:
        self._model, self._cache, self._trace = model, cache, trace

    def warm_up(self, n_prompt: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Does nothing: arrays are allocated when they are needed."""

    def wait(self) -> None:
        """Does nothing: a run has ended when its results are there."""

    def run(self, parts: Sequence[ScheduledChunk], ahead: bool = False) -> list[Result]:
        inputs = [(part.generation.progress.cached, part.ids) for part in parts]
        logits = self._model.evaluate(inputs, self._cache, wanted_rows(parts), self._trace)
        rows = iter(to_numpy(logits) if any(map(n_rows, parts)) else ())
        results = []
        for part in parts:
            own = [next(rows) for _ in range(n_rows(part))]
            results.append(result_of(part, own, partial(draw, own[-1], part) if part.draws else None))
        return results


def result_of(part: ScheduledChunk, rows: Sequence[Any], draw: Callable[[], int] | None) -> Result:
    """The result of a part from its rows of logits on the host, (n_vocab,) each, of which it needs those that are
    scored. draw: samples its token, if it draws one."""
    generation, params = part.generation, part.generation.params
    try:
        scores = tuple(
            [
                score_of(row, generation.ids[part.start + i + 1], params.prompt_logprobs or 0)
                for i, row in enumerate(rows[: part.n_scored])
            ]
        )
        if draw is None:
            return Result(prompt_scores=scores)
        token = draw()
        score = None if params.logprobs is None else score_of(rows[-1], token, params.logprobs)
        return Result(token, score, scores)
    except RefengineError as e:
        return Result(error=e)


def draw(row: Any, part: ScheduledChunk) -> int:
    """Sample the part's token on the host, from logits (n_vocab,)."""
    generation = part.generation
    return sample(row, generation.params, generation.ids, generation.seed, generation.n_generated)


def score_of(row: Any, token: int, n_top: int) -> Score:
    own, top = logprobs(row, token, n_top)
    return Score(own, tuple(top))
