"""A step's forward pass and its draws, on array code or on kernels. Knows nothing of scheduling and text."""

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
class SampledToken:
    """A token that was drawn."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of a part: what was drawn after it, where it draws; of its ids that are scored, their next ids' scores;
    or why there is neither."""

    drawn: SampledToken | None = None
    scores: tuple[Score, ...] = ()
    error: RefengineError | None = None


class Runner(Protocol):
    def run(self, parts: Sequence[ScheduledChunk]) -> list[Result]:
        """Feed the parts; one result for each, in order."""

    def warm_up(self, n_prompt: int) -> None:
        """Compile and allocate what the first request would wait for; with a prompt of so many tokens, if any."""


def wanted_rows(parts: Sequence[ScheduledChunk]) -> list[int]:
    """Batch rows whose logits are wanted: of each part those that are scored, then the one that it draws from."""
    rows: list[int] = []
    start = 0
    for part in parts:
        rows += range(start, start + part.n_scored)
        start += len(part.ids)
        if part.draws:
            rows.append(start - 1)
    return rows


def n_rows(part: ScheduledChunk) -> int:
    """How many of `wanted_rows` are a part's."""
    return part.n_scored + part.draws


class ArrayRunner:
    """All chunks through `model.evaluate` together, draws on the host: every device and profile can.

    max_batch and graphs make no difference here; every runner is made with the same arguments.
    """

    def __init__(
        self, model: Any, cache: KVCache, max_batch: int = 1, graphs: bool = False, trace: Tracer = no_trace
    ) -> None:
        self._model, self._cache, self._trace = model, cache, trace

    def warm_up(self, n_prompt: int) -> None:
        """Nothing: arrays are allocated as they are wanted."""

    def run(self, parts: Sequence[ScheduledChunk]) -> list[Result]:
        given = [(part.generation.progress.cached, part.ids) for part in parts]
        logits = self._model.evaluate(given, self._cache, wanted_rows(parts), self._trace)
        rows = iter(to_numpy(logits) if any(map(n_rows, parts)) else ())
        results = []
        for part in parts:
            own = [next(rows) for _ in range(n_rows(part))]
            results.append(result_of(part, own, partial(draw, own[-1] if own else None, part)))
        return results


def result_of(part: ScheduledChunk, rows: Sequence[Any], draw: Callable[[], int]) -> Result:
    """On the host, from the part's wanted rows of logits, (n_vocab,) each. draw: gives its token."""
    generation, params = part.generation, part.generation.params
    try:
        scores = tuple(
            score_of(row, generation.ids[part.start + i + 1], params.prompt_logprobs or 0)
            for i, row in enumerate(rows[: part.n_scored])
        )
        if not part.draws:
            return Result(None, scores)
        return Result(with_logprobs(draw(), rows[-1], params.logprobs), scores)
    except RefengineError as e:
        return Result(error=e)


def draw(row: Any, part: ScheduledChunk) -> int:
    """On the host, from logits (n_vocab,)."""
    generation = part.generation
    return sample(row, generation.params, generation.ids, generation.seed, generation.n_generated)


def with_logprobs(token: int, row: Any, n_top: int | None) -> SampledToken:
    if n_top is None:
        return SampledToken(token)
    score = score_of(row, token, n_top)
    return SampledToken(token, score.logprob, score.top)


def score_of(row: Any, token: int, n_top: int) -> Score:
    own, top = logprobs(row, token, n_top)
    return Score(own, tuple(top))
