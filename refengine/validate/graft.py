"""Grafting: measures the effect of one wrong operation on the logits, and of all others without it.

The other engine's local error of a tensor is its value minus ours on the same inputs. Added to our tensor in our own
run, it propagates as in that engine. So errors can be applied one at a time, or all but one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from refengine.model import Model
from refengine.trace import Trace, to_numpy
from refengine.validate.alignment import part_of, put_into
from refengine.validate.capture import Capture
from refengine.validate.judge import Verdict
from refengine.validate.metrics import LogitMetrics, compare_logits


@dataclass(frozen=True)
class Graft:
    """Logits compared with our own: with only the own error of tensor `name` (alone), and with all others (others)."""

    name: str
    alone: LogitMetrics
    others: LogitMetrics


def graft(model: Model, verdict: Verdict, name: str) -> Graft:
    """The effect of the own error of tensor `name` on the logits. Needs three forward passes.

    Raises ValueError for a tensor without an own error in this verdict.
    """
    wrong = [t.name for t in verdict.tensors if t.own_error]
    if name not in wrong:
        raise ValueError(f"tensor {name} has no error of its own")
    capture = verdict.capture
    errors = {other: _change(other, verdict.replayed[other], capture.tensors[other]) for other in wrong}
    right = _logits(model, capture, errors, ())
    alone = _logits(model, capture, errors, (name,))
    others = _logits(model, capture, errors, (other for other in wrong if other != name))
    return Graft(name, compare_logits(alone, right, capture.ids), compare_logits(others, right, capture.ids))


def _logits(
    model: Model, capture: Capture, errors: dict[str, Callable[[np.ndarray], np.ndarray]], names: Iterable[str]
) -> np.ndarray:
    trace = Trace(replace={name: errors[name] for name in names}, strict=False)
    return model.forward(capture.ids, trace=trace, chunk=len(capture.ids))


def _change(name: str, ours: np.ndarray, theirs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that adds the local error to a tensor. Indices of chosen experts are replaced by theirs instead."""
    if ours.dtype.kind != "f":
        return lambda value: put_into(name, to_numpy(value), theirs)
    error = theirs.astype(np.float64) - ours.astype(np.float64)

    def changed(value: np.ndarray) -> np.ndarray:
        right = to_numpy(value)
        return put_into(name, right, part_of(name, right, theirs) + error)

    return changed
