"""Finds the first tensor of another engine that is wrong because of its own operation.

Every operation is run on the inputs that the other engine captured (replay). The difference is the local error, which
does not include inherited errors. It is compared with a measured noise floor: the difference between runs of the same
operation on the same inputs with sums in float64, in float32, and in float32 in the reverse order. This is how much two
correct engines may differ by their order of additions.

If the capture lacks tensors, there are several operations between two tensors that it has, and a product that rounds
its inputs may round one of them the other way (a flip). To measure this noise, the missing tensors are shaken: changed
at random, in some runs by two units in the last place (gentle), in others by sixteen times as much (rough), which finds
more of the rare flips. If the rough runs differ by more than in proportion to the shaking, flips have occurred, and the
rough runs determine the floor; otherwise the gentle ones do.

    threshold = max(SUM_MARGIN · floor, POINTWISE)      all as NMSE

SUM_MARGIN: over 91 models of six architectures and twelve types, llama.cpp's local error was at most 6.1 times the
floor (products with Q5_1 weights), 0.2 times in the median. POINTWISE: if nothing is summed (or sums are exact), it
was at most 7e-15 (exponentials in float32); an error of three units in the last place of every element is 3e-14.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from refengine.errors import ModelError, RequestError
from refengine.model import Model
from refengine.ops import Ops
from refengine.trace import Trace, to_numpy
from refengine.validate.alignment import align, may_be_cut, part_of, row_axis, substitution
from refengine.validate.capture import LOGITS, Capture
from refengine.validate.metrics import LogitMetrics, TensorMetrics, compare, compare_logits, nmse

SUM_MARGIN = 16.0
POINTWISE = 3e-14
SHAKE = 2.0**-22  # relative: two units in the last place of float32
ROUGHER = 16.0
SHAKEN_RUNS = 4
AGREES, DIVERGES, NOTHING_COMPARED = 0, 1, 3  # exit codes; 2 is for wrong arguments

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict about one tensor.

    local: the error on the other engine's inputs. total: the error between both engines' own runs.
    layout: how the other engine's tensor was brought into our shape, as text; empty if it already had it.
    """

    name: str
    local: TensorMetrics
    total: TensorMetrics
    floor: float
    threshold: float
    layout: str = ""

    @property
    def own_error(self) -> bool:
        return not self.local.finite or self.local.nmse > self.threshold

    @property
    def margin(self) -> float:
        """The threshold divided by the local error; infinite if there is no error."""
        return self.threshold / self.local.nmse if self.local.nmse else math.inf


@dataclass(frozen=True)
class Verdict:
    """The verdict about a capture. True if something was compared and the engines agree in all of it.

    tensors: in order of evaluation. missing: our tensors that the capture lacks. unknown: its tensors that we lack.
    logits: the capture's compared with those of our own run, at the positions that it has.
    capture: the judged capture, with its tensors in our shapes and axis order (`validate.alignment`).
    replayed: by name, our tensors computed from its inputs, in the rows that it has.
    """

    tensors: tuple[TensorVerdict, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    logits: LogitMetrics | None
    capture: Capture = field(repr=False)
    replayed: Mapping[str, np.ndarray] = field(repr=False)

    def __bool__(self) -> bool:
        return self.exit_code == AGREES

    @property
    def first_own_error(self) -> TensorVerdict | None:
        return next((t for t in self.tensors if t.own_error), None)

    @property
    def least_margin(self) -> TensorVerdict | None:
        """The tensor that is nearest to its threshold, or furthest above it."""
        return min(self.tensors, key=lambda t: t.margin, default=None)

    @property
    def exit_code(self) -> int:
        if not self.tensors:
            return NOTHING_COMPARED
        return DIVERGES if self.first_own_error else AGREES


def judge(
    model: Model,
    capture: Capture,
    *,
    tolerances: Sequence[tuple[str, float]] = (),
    model_sha256: str | None = None,
    progress: Progress = lambda stage: None,
) -> Verdict:
    """Judge another engine's tensors by this model, which must have that engine's numerics profile.

    tolerances:   (regular expression on full names, NMSE); the last match replaces the measured threshold.
    model_sha256: the hash of our file, compared with the capture's. None: not compared.
    Raises ModelError for another model, RequestError for invalid ids or an invalid expression, TraceError for a tensor
    whose size differs from ours.
    """
    if model_sha256 and capture.model_sha256 and model_sha256 != capture.model_sha256:
        raise ModelError(
            f"{capture.source} was made with another model file (sha256 {capture.model_sha256[:12]}…, ours "
            f"{model_sha256[:12]}…); skip this check only if you know that the files are equivalent"
        )
    model.check_ids(capture.ids)
    patterns = [(_expression(text), value) for text, value in tolerances]

    progress("our own run")
    own = _Run(capture.tensors)
    logits = own.forward(model, capture.ids)
    capture, layouts = _aligned(capture, own.values, model.config.n_layer)
    peer = capture.tensors
    progress("every operation on the other engine's inputs")
    replayed = _Run(peer, substitute=True)
    replayed.forward(model, capture.ids)
    progress("noise floors")
    missing = tuple(name for name in own.seen if name not in peer)
    other_sums = _in_other_width(model)
    backwards = _variant(model, sum_dtype=np.float32, reversed_sums=True)
    seeds = range(SHAKEN_RUNS if missing else 1)
    noise = partial(_Run, peer, substitute=True, reference=replayed.values, shaken=missing)
    gentle = [noise(shake=SHAKE, seed=seed) for seed in (*seeds, SHAKEN_RUNS)]
    rough = [noise(shake=ROUGHER * SHAKE, seed=seed) for seed in seeds if missing]
    for run in (*gentle[:-1], *rough):
        run.forward(other_sums, capture.ids)
    gentle[-1].forward(backwards, capture.ids)

    verdicts = []
    for name, value in replayed.values.items():
        floor = max(run.distances[name] for run in gentle)
        if rough:
            flips = max(run.distances[name] for run in rough)
            proportionate = max(floor, SHAKE**2) * ROUGHER**2
            floor = flips if flips > ROUGHER * proportionate else floor
        matching = [tolerance for pattern, tolerance in patterns if pattern.search(name)]
        verdicts.append(
            TensorVerdict(
                name,
                local=_compared(name, peer[name], value, own.values[name]),
                total=_compared(name, peer[name], part_of(name, own.values[name], peer[name]), own.values[name]),
                floor=floor,
                threshold=matching[-1] if matching else max(SUM_MARGIN * floor, POINTWISE),
                layout=layouts[name],
            )
        )
    return Verdict(
        tensors=tuple(verdicts),
        missing=missing,
        unknown=tuple(name for name in peer if name not in own.seen),
        logits=_logits(other_sums, capture, logits, list(own.seen)),
        capture=capture,
        replayed=replayed.values,
    )


def _compared(name: str, theirs: np.ndarray, ours: np.ndarray, whole: np.ndarray) -> TensorMetrics:
    """Like `compare`, but the worst coordinate is that of the `whole` of our tensor; theirs may lack the first rows."""
    metrics, axis = compare(theirs, ours), row_axis(name)
    worst = list(metrics.worst)
    worst[axis] += whole.shape[axis] - theirs.shape[axis]
    return replace(metrics, worst=tuple(worst))


def _aligned(capture: Capture, own: Mapping[str, np.ndarray], n_layer: int) -> tuple[Capture, dict[str, str]]:
    """The capture, with its tensors in our shapes as far as we have them, and notes on their layouts by name."""
    tensors, layouts = dict(capture.tensors), {}
    for name, ours in own.items():
        rows_cut = may_be_cut(name, n_layer)
        tensors[name], layouts[name] = align(name, capture.tensors[name], ours, rows_cut=rows_cut)
    return replace(capture, tensors=tensors), layouts


def _logits(other_sums: Model, capture: Capture, ours: np.ndarray, names: Sequence[str]) -> LogitMetrics | None:
    """The capture's logits compared with ours. The effect of rounding is measured only if a token flips."""
    if LOGITS not in capture.tensors:
        return None
    theirs = capture.tensors[LOGITS]
    reference, n = part_of(LOGITS, ours, theirs), len(theirs)
    ids, first = capture.ids[-n:], len(ours) - n
    metrics = compare_logits(theirs, reference, ids, first_position=first)
    if not metrics.flips:
        return metrics
    bounds = np.zeros(n)
    for seed in range(SHAKEN_RUNS):
        shaken = _Run({}, shaken=names, shake=SHAKE, seed=seed).forward(other_sums, capture.ids)
        bounds = np.maximum(bounds, np.abs(shaken[first:].astype(np.float64) - reference).max(axis=1))
    return compare_logits(theirs, reference, ids, bounds, first_position=first)


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise RequestError(f"tolerance pattern {text!r} is not a regular expression: {e}") from None


def _in_other_width(model: Model) -> Model:
    """The model with sums in float64 instead of float32, or the reverse; for the exact profiles all arithmetic."""
    numerics = model.ops.numerics
    if numerics.as_llamacpp or numerics.as_kernels:
        return _variant(model, sum_dtype=np.float32)
    other = np.float32 if numerics.dtype is np.float64 else np.float64
    return _variant(model, dtype=other, sum_dtype=other)


def _variant(model: Model, **numerics: Any) -> Model:
    """The same model with other numerics. It runs only once, so it keeps no dequantised weights."""
    ops = Ops(model.ops.xp, replace(model.ops.numerics, **numerics), cache_bytes=0)
    return Model(model.gguf, model.config, model.vocabulary, model.weights, ops, model.device, model.n_ctx)


class _Run:
    """One forward pass that keeps our tensors which the peer has too, and optionally replaces them by the peer's.

    substitute: replace our tensors by the peer's, which must be aligned; only the rows that the peer has are kept.
    reference: if given, only the NMSE of each tensor from the reference is kept, as a measure of noise.
    shaken: the names of tensors to change at random by a few units in the last place, to measure rounding's effect.
    """

    def __init__(
        self,
        peer: Mapping[str, np.ndarray],
        *,
        substitute: bool = False,
        reference: Mapping[str, np.ndarray] | None = None,
        shaken: Sequence[str] = (),
        shake: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.distances: dict[str, float] = {}
        self.seen: dict[str, None] = {}
        self._peer, self._substitute, self._reference = peer, substitute, reference
        self._shaken, self._amount, self._rng = shaken, shake, np.random.default_rng(seed)

    def forward(self, model: Model, ids: Sequence[int]) -> np.ndarray:
        shaking = {name: self._shake for name in self._shaken}
        trace = Trace(replace=shaking | {name: self._at(name) for name in self._peer}, strict=False)
        logits = model.forward(ids, trace=trace, chunk=len(ids))
        self.seen = trace.seen
        return logits

    def _shake(self, ours: np.ndarray) -> np.ndarray:
        if ours.dtype.kind != "f":  # indices of chosen experts
            return ours
        values = to_numpy(ours)
        amounts = self._rng.uniform(-self._amount, self._amount, values.shape).astype(values.dtype)
        shaken: np.ndarray = values + values * amounts
        return shaken  # Trace copies it to the tensor's device

    def _at(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        def keep(ours: np.ndarray) -> None:
            if self._reference is None:
                self.values[name] = ours
            else:
                self.distances[name] = nmse(ours, self._reference[name])

        def look(ours: np.ndarray) -> np.ndarray:
            keep(to_numpy(ours))
            return ours

        return substitution(name, self._peer[name], keep) if self._substitute else look
