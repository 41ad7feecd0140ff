"""An outcome as JSON data with the schema `refengine-verdict`. NaN and infinity, which JSON lacks, are null."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from refengine.validate.metrics import LogitMetrics
from refengine.validate.run import Outcome

SCHEMA_VERSION = 2


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The whole outcome as plain JSON values."""
    verdict, capture, graft = outcome.verdict, outcome.verdict.capture, outcome.graft
    first = verdict.first_own_error
    report: dict[str, Any] = _plain({
        "schema": "refengine-verdict",
        "schema_version": SCHEMA_VERSION,
        "verdict": {0: "agrees", 1: "diverges", 3: "nothing compared"}[verdict.exit_code],
        "first_own_error": first.name if first else None,
        "where": outcome.where,
        "causes": list(outcome.causes),
        "graft": graft and {"name": graft.name, "alone": _logits(graft.alone), "others": _logits(graft.others)},
        "facts": dict(outcome.facts),
        "peer": {
            "engine": capture.engine,
            "source": capture.source.name,
            "numerics": capture.numerics,
            "flags": dict(capture.flags),
            "complete": capture.complete,
        },
        "ids": capture.ids,
        "tensors": [
            {
                "name": t.name,
                "own_error": t.own_error,
                "floor": t.floor,
                "threshold": t.threshold,
                "margin": t.margin,
                "layout": t.layout,
                "local": asdict(t.local),
                "total": asdict(t.total),
            }
            for t in verdict.tensors
        ],
        "missing": list(verdict.missing),
        "unknown": list(verdict.unknown),
        "logits": verdict.logits and _logits(verdict.logits),
    })  # fmt: skip
    return report


def _logits(metrics: LogitMetrics) -> dict[str, Any]:
    flips = [{**asdict(flip), "is_tie": flip.is_tie} for flip in metrics.flips]
    means = {"kl_mean": metrics.kl_mean, "kl_p99": metrics.kl_p99, "kl_max": metrics.kl_max}
    return {**asdict(metrics), **means, "flips": flips}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
