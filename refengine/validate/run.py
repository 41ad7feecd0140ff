"""Runs one validation: the verdict and, if the engines diverge, the likely cause and the effect on the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import refengine
from refengine.model import Model
from refengine.validate.capture import Capture
from refengine.validate.causes import likely_causes, whereabouts
from refengine.validate.graft import Graft, graft
from refengine.validate.judge import Progress, Verdict, judge
from refengine.weights import quant_kind


@dataclass(frozen=True)
class Outcome:
    """The result of a validation. True if the engines agree.

    causes: known mistakes that explain the first own error, as text. where: the part of the tensor that is wrong, as
    text; empty if all of it is wrong. graft: the effect of that error on the logits.
    facts: versions, model, hash and numerics of the run.
    """

    verdict: Verdict
    causes: tuple[str, ...]
    where: str
    graft: Graft | None
    facts: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.verdict)


def validate(
    model: Model,
    capture: Capture,
    *,
    tolerances: Sequence[tuple[str, float]] = (),
    model_sha256: str | None = None,
    any_model: bool = False,
    progress: Progress = lambda stage: None,
) -> Outcome:
    """Judge a capture (`judge.judge`), then find the cause of the first own error and its effect on the logits.

    model_sha256: the hash of our file, for `facts`; compared with the capture's unless `any_model`.
    Raises the errors of `judge`.
    """
    verdict = judge(
        model,
        capture,
        tolerances=tolerances,
        model_sha256=None if any_model else model_sha256,
        progress=progress,
    )
    first, causes, where, grafted = verdict.first_own_error, [], "", None
    if first is not None:
        progress(f"known mistakes, tried on {first.name}")
        where = whereabouts(verdict, first)
        causes = likely_causes(model, verdict, first)
        progress(f"what {first.name} does to the logits")
        grafted = graft(model, verdict, first.name)
    return Outcome(verdict, tuple(causes), where, grafted, _facts(model, model_sha256))


def _facts(model: Model, sha256: str | None) -> dict[str, Any]:
    return {
        "refengine": refengine.__version__,
        "model": model.gguf.path.name,
        "model_sha256": sha256,
        "arch": model.config.arch,
        "quant_kind": quant_kind(model.gguf),
        "n_layer": model.config.n_layer,
        "device": model.device.name,
        "numerics": model.ops.numerics.name,
        "kv_type": np.dtype(model.ops.numerics.kv_dtype).name,
    }
