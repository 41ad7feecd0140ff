"""Which tensor of another engine went wrong first, and whether the error is its own.

Every operation is run on the inputs that the other engine captured (replay), so that what it inherited does not count:
that is the local error. It is judged against a noise floor that is measured, not chosen: the same operation on the same
inputs with its sums in float32 and in float64, which is how much two right engines may differ by their order of
additions.

Where the capture leaves tensors out, several operations stand between two that it has, and a product that rounds its
inputs may round one of them the other way. What that makes of the noise is found by shaking the tensors left out, a few
times by two units in the last place, and a few times sixteen times as much, which meets more of the rare flips. Where
the rougher runs are further off than in proportion, a flip it was, and they are the floor; else the gentle ones are.

    threshold = max(SUM_MARGIN · floor, POINTWISE)      all as NMSE

SUM_MARGIN: over 91 models of six architectures and twelve types, llama.cpp's local error was at most 6.1 times the
floor (products with Q5_1 weights), 0.2 times in the median. POINTWISE: where nothing is summed (or sums are exact), it
was at most 7e-15 (exponentials in float32); an error of three units in the last place of every element is 3e-14.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refengine.errors import ModelError, RequestError
from refengine.model import Model
from refengine.ops import Ops
from refengine.trace import Trace, to_numpy
from refengine.validate.capture import LOGITS, Capture
from refengine.validate.metrics import LogitMetrics, TensorMetrics, compare, compare_logits
from refengine.validate.replay import align, nmse

SUM_MARGIN = 16.0
POINTWISE = 3e-14
SHAKE = 2.0**-22  # relative: two units in the last place of float32
ROUGHER = 16.0
SHAKEN_RUNS = 4
AGREES, DIVERGES, NOTHING_COMPARED = 0, 1, 3  # exit codes; 2 is wrong use

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TensorVerdict:
    """One tensor. `local`: on the other engine's inputs; `total`: at the end of both engines' own way there."""

    name: str
    local: TensorMetrics
    total: TensorMetrics
    floor: float
    threshold: float

    @property
    def own_error(self) -> bool:
        return not self.local.finite or self.local.nmse > self.threshold

    @property
    def margin(self) -> float:
        """How far below its threshold the local error is, as a factor; infinite where there is no error."""
        return self.threshold / self.local.nmse if self.local.nmse else math.inf


@dataclass(frozen=True)
class Verdict:
    """The outcome. True where the engines agree in everything that was compared, and something was.

    tensors: in order of evaluation. missing: ours that the capture lacks. unknown: those of the capture that we lack.
    logits: our own free run against the capture's, where it has logits of every position.
    """

    tensors: tuple[TensorVerdict, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    logits: LogitMetrics | None
    complete: bool

    def __bool__(self) -> bool:
        return self.exit_code == AGREES

    @property
    def first_own_error(self) -> TensorVerdict | None:
        return next((t for t in self.tensors if t.own_error), None)

    @property
    def least_margin(self) -> TensorVerdict | None:
        """The tensor that is nearest to its threshold, or furthest beyond."""
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
    """Judge another engine's tensors by this model, which must run under that engine's numerics profile.

    tolerances:   (regular expression on full names, NMSE); the last that matches replaces the measured threshold.
    model_sha256: of our file; refused where the capture names another. None does not ask.
    Raises ModelError for another model, RequestError for ids that do not fit it or a bad expression, TraceError for a
    tensor of a size that is not ours.
    """
    if model_sha256 and capture.model_sha256 and model_sha256 != capture.model_sha256:
        raise ModelError(
            f"{capture.source} was made with another model file (sha256 {capture.model_sha256[:12]}…, ours "
            f"{model_sha256[:12]}…); waive this only if you know that the files are equivalent"
        )
    model.check_ids(capture.ids)
    patterns = [(_expression(text), value) for text, value in tolerances]
    peer = capture.tensors

    progress("our own run")
    own = _Run(peer, substitute=False)
    logits = own.forward(model, capture.ids)
    progress("every operation on the other engine's inputs")
    replayed = _Run(peer, substitute=True)
    replayed.forward(model, capture.ids)
    progress("noise floors")
    missing = tuple(name for name in own.seen if name not in peer)
    wide = model.ops.numerics.sum_dtype is np.float64
    other_sums = _with_sums_in(model, np.float32 if wide else np.float64)
    seeds = range(SHAKEN_RUNS if missing else 1)
    gentle = [_Run(peer, substitute=True, shaken=missing, shake=SHAKE, seed=seed) for seed in seeds]
    rough = [_Run(peer, substitute=True, shaken=missing, shake=ROUGHER * SHAKE, seed=seed) for seed in seeds if missing]
    for run in (*gentle, *rough):
        run.forward(other_sums, capture.ids)

    verdicts = []
    for name, value in replayed.values.items():
        theirs = align(name, peer[name], value.shape)
        floor = max(nmse(run.values[name], value) for run in gentle)
        if rough:
            flips = max(nmse(run.values[name], value) for run in rough)
            proportionate = max(floor, SHAKE**2) * ROUGHER**2
            floor = flips if flips > ROUGHER * proportionate else floor
        given = [tolerance for pattern, tolerance in patterns if pattern.search(name)]
        verdicts.append(
            TensorVerdict(
                name,
                local=compare(theirs, value),
                total=compare(theirs, own.values[name]),
                floor=floor,
                threshold=given[-1] if given else max(SUM_MARGIN * floor, POINTWISE),
            )
        )
    peer_logits = peer.get(LOGITS)
    comparable = peer_logits is not None and peer_logits.shape == logits.shape
    return Verdict(
        tensors=tuple(verdicts),
        missing=missing,
        unknown=tuple(name for name in peer if name not in own.seen),
        logits=compare_logits(peer[LOGITS], logits, capture.ids) if comparable else None,
        complete=capture.complete,
    )


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise RequestError(f"tolerance pattern {text!r} is not a regular expression: {e}") from None


def _with_sums_in(model: Model, dtype: type) -> Model:
    """The same model with its products summed in another type. It runs once: no dequantised weight is worth keeping."""
    numerics = replace(model.ops.numerics, sum_dtype=dtype)
    ops = Ops(model.ops.xp, numerics, cache_bytes=0)
    return Model(model.gguf, model.config, model.tokenizer, model.weights, ops, model.device, model.n_ctx)


class _Run:
    """One forward pass whose tensors are kept where the peer has them, and replaced by the peer's if asked.

    shaken: tensors to move by a few units in the last place, at random, to see what rounding makes of that.
    """

    def __init__(
        self,
        peer: Mapping[str, np.ndarray],
        *,
        substitute: bool,
        shaken: Sequence[str] = (),
        shake: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.seen: dict[str, None] = {}
        self._peer, self._substitute = peer, substitute
        self._shaken, self._amount, self._rng = shaken, shake, np.random.default_rng(seed)

    def forward(self, model: Model, ids: Sequence[int]) -> np.ndarray:
        moved = {name: self._shake for name in self._shaken}
        trace = Trace(replace=moved | {name: self._at(name) for name in self._peer})
        logits = model.forward(ids, trace=trace, chunk=len(ids))
        self.seen = trace.seen
        return logits

    def _shake(self, ours: np.ndarray) -> np.ndarray:
        if ours.dtype.kind != "f":  # chosen experts
            return ours
        values = to_numpy(ours)
        shaken = values + values * self._rng.uniform(-self._amount, self._amount, values.shape).astype(values.dtype)
        return shaken  # Trace puts it on the tensor's device

    def _at(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        def replacement(ours: np.ndarray) -> np.ndarray:
            theirs = align(name, self._peer[name], ours.shape)  # an unfit size is said before anything is judged
            self.values[name] = to_numpy(ours)
            return theirs if self._substitute else ours

        return replacement
