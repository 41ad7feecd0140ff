"""A step's forward pass and its draws, on array code or on kernels. Knows nothing of scheduling and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from refengine.engine.sampling import logprobs, sample
from refengine.engine.scheduler import Part
from refengine.errors import RefengineError
from refengine.kv_cache import KVCache
from refengine.trace import Tracer, no_trace, to_numpy


@dataclass(frozen=True)
class Drawn:
    """What was drawn after a part, or why nothing could be."""

    id: int = -1
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: RefengineError | None = None


class Runner(Protocol):
    def run(self, parts: Sequence[Part]) -> list[Drawn]:
        """Feed the parts; one result for each part that draws, in order."""

    def warm_up(self, n_prompt: int) -> None:
        """Compile and allocate what the first request would wait for; with a prompt of so many tokens, if any."""


def last_rows(parts: Sequence[Part]) -> list[int]:
    """Batch rows of the last ids of the parts that draw."""
    rows, end = [], 0
    for part in parts:
        end += len(part.ids)
        if part.draws:
            rows.append(end - 1)
    return rows


class ArrayRunner:
    """`model.step` for all parts together, draws on the host: every device and profile can."""

    def __init__(self, model: Any, cache: KVCache, trace: Tracer = no_trace) -> None:
        self._model, self._cache, self._trace = model, cache, trace

    def warm_up(self, n_prompt: int) -> None:
        """Nothing: arrays are allocated as they are wanted."""

    def run(self, parts: Sequence[Part]) -> list[Drawn]:
        given = [(part.generation.progress.cached, part.ids) for part in parts]
        logits = self._model.step(given, self._cache, last_rows(parts), self._trace)
        drawing = [part for part in parts if part.draws]
        if not drawing:
            return []
        return [draw(row, part) for row, part in zip(to_numpy(logits), drawing, strict=True)]


def draw(row: Any, part: Part) -> Drawn:
    """On the host, from logits (n_vocab,)."""
    generation = part.generation
    try:
        token = sample(row, generation.params, generation.ids, generation.seed, generation.n_generated)
        return with_logprobs(token, row, generation.params.logprobs)
    except RefengineError as e:
        return Drawn(error=e)


def with_logprobs(token: int, row: Any, n_top: int | None) -> Drawn:
    if n_top is None:
        return Drawn(token)
    own, top = logprobs(row, token, n_top)
    return Drawn(token, own, tuple(top))
