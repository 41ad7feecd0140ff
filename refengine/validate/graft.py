"""Grafting: what one wrong step costs at the logits, and what is left once it is mended.

The other engine's local error at a tensor is what it got minus what we get on its inputs. Added to ours in a run of our
own, it travels on as it would in that engine; so errors can be had one by one, or all but one.
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
    """Logits against our own, with the own error of tensor `name` `alone`, and with those of all `others` but it."""

    name: str
    alone: LogitMetrics
    others: LogitMetrics


def graft(model: Model, verdict: Verdict, name: str) -> Graft:
    """What the own error of tensor `name` does to the logits. Costs three forward passes.

    Raises ValueError for a tensor that has no own error in this verdict.
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
    """Adds the local error. Chosen experts are not added to: theirs are taken."""
    if ours.dtype.kind != "f":
        return lambda value: put_into(name, to_numpy(value), theirs)
    error = theirs.astype(np.float64) - ours.astype(np.float64)

    def changed(value: np.ndarray) -> np.ndarray:
        right = to_numpy(value)
        return put_into(name, right, part_of(name, right, theirs) + error)

    return changed
