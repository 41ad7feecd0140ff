"""Finds why a tensor is wrong: tries known mistakes on the other engine's own inputs, and locates the error.

A hypothesis (`validate.mistakes`) changes our model in a way in which engines are often wrong. If the changed
operation, run on the other engine's inputs, gives the other engine's result, the mistake is reported. Nothing is
guessed from the appearance of numbers; a cause without a hypothesis is not reported. The place of the error in the
tensor (from one token on, one head, one column) is reported as well, because it narrows the search.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping

import numpy as np

from refengine.model import Model
from refengine.trace import Trace
from refengine.validate.alignment import row_axis, substitution
from refengine.validate.judge import POINTWISE, TensorVerdict, Verdict
from refengine.validate.metrics import compare, nmse
from refengine.validate.mistakes import hypotheses

MATCH = 1e-3  # a hypothesis must explain the error up to this share of its NMSE
LISTED = 6  # how many indices are listed one by one


def likely_causes(model: Model, verdict: Verdict, wrong: TensorVerdict) -> list[str]:
    """The mistakes that explain this tensor, the best explanation first. Needs a forward pass for each one tried."""
    tensors, ids = verdict.capture.tensors, verdict.capture.ids
    limit = max(wrong.threshold, MATCH * wrong.local.nmse)
    right, theirs = verdict.replayed[wrong.name], tensors[wrong.name]
    found: list[tuple[float, str]] = []
    for hypothesis in hypotheses(model, first_wrong_row(wrong, theirs, right)):
        if re.search(hypothesis.tensors, wrong.name):
            left = _distance(theirs, _replayed(hypothesis.apply(model), ids, tensors, wrong.name))
            if left <= limit:
                found.append((left, hypothesis.text))
    if not found:
        found = [(0.0, text) for text in _simple_relations(wrong, theirs, right, tensors, limit)]
    return [text for _, text in sorted(found, key=lambda entry: entry[0])]


def whereabouts(verdict: Verdict, wrong: TensorVerdict) -> str:
    """The part of the tensor that is wrong, as text; empty if all of it is wrong."""
    right, theirs = verdict.replayed[wrong.name], verdict.capture.tensors[wrong.name]
    token_axis, places = row_axis(wrong.name), []
    first_token = len(verdict.capture.ids) - right.shape[token_axis]  # rows may be cut to the last ones
    for axis in range(right.ndim):
        wrong_here = _wrong_along(axis, theirs, right, wrong.threshold)
        if len(wrong_here) == right.shape[axis]:
            continue
        if axis == token_axis:
            places.append(f"token {_listed([first_token + i for i in wrong_here])}")
        elif axis == right.ndim - 1:
            places.append(f"column {_listed(wrong_here)}")
        else:
            places.append(f"{'rank' if 'moe' in wrong.name else 'head'} {_listed(wrong_here)}")
    return "only at " + ", ".join(places) if places else ""


def first_wrong_row(wrong: TensorVerdict, theirs: np.ndarray, right: np.ndarray) -> int:
    """The first token at which the tensor is wrong; 0 if it cannot be determined."""
    rows = _wrong_along(row_axis(wrong.name), theirs, right, wrong.threshold)
    return rows[0] if rows else 0


def _wrong_along(axis: int, theirs: np.ndarray, right: np.ndarray, threshold: float) -> list[int]:
    """The indices of an axis at which the mean square error, relative to the tensor's mean square, is too large."""
    a, b = (np.moveaxis(v, axis, 0).reshape(right.shape[axis], -1).astype(np.float64) for v in (theirs, right))
    usable = np.isfinite(a) & np.isfinite(b)
    square = np.where(usable, np.square(np.where(usable, a - b, 0.0)), 0.0).mean(axis=1)
    power = float(np.mean(np.square(np.where(np.isfinite(b), b, 0.0)))) or 1.0
    odd = (np.isfinite(a) != np.isfinite(b)).any(axis=1)
    return np.flatnonzero(odd | (square / power > max(threshold, POINTWISE))).tolist()


def _listed(indices: list[int]) -> str:
    """`3`, `1, 4, 9` or `17 to 23`."""
    if len(indices) > 2 and indices[-1] - indices[0] == len(indices) - 1:
        return f"{indices[0]} to {indices[-1]}"
    more = f" and {len(indices) - LISTED} more" if len(indices) > LISTED else ""
    return ", ".join(map(str, indices[:LISTED])) + more


def _simple_relations(
    wrong: TensorVerdict, theirs: np.ndarray, right: np.ndarray, tensors: Mapping[str, np.ndarray], limit: float
) -> list[str]:
    """Simple relations of a wrong tensor, as text: a multiple of the right one, or equal to another captured tensor."""
    if right.dtype.kind != "f" or not (np.isfinite(theirs).all() and np.isfinite(right).all()):
        return []
    wide = right.astype(np.float64)
    power = float(np.square(wide).sum())
    factor = float((theirs.astype(np.float64) * wide).sum()) / power if power else 0.0
    if factor and _distance(theirs, wide * factor) <= limit:
        return [f"it is {factor:.6g} times what it should be"]
    for name, other in tensors.items():
        alike = name != wrong.name and other.size == theirs.size and other.dtype.kind == "f"
        if alike and _distance(other.reshape(theirs.shape), theirs) <= limit:
            return [f"it is {name}, unchanged"]
    return []


def _distance(theirs: np.ndarray, value: np.ndarray) -> float:
    """The NMSE; infinite if NaN and infinities are at different places."""
    if theirs.shape != value.shape:
        return math.inf
    if np.isfinite(theirs).all() and np.isfinite(value).all():
        return nmse(theirs, value)
    with np.errstate(all="ignore"):
        metrics = compare(theirs, value)
    return metrics.nmse if metrics.finite else math.inf


class _Reached(Exception):
    """Ends the forward pass after the tensor has been computed."""


def _replayed(model: Model, ids: list[int], tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Tensor `name` as this model computes it from the capture's inputs, in the rows that the capture has."""
    result: list[np.ndarray] = []

    def reached(ours: np.ndarray) -> None:
        result.append(ours)
        raise _Reached

    def passed(ours: np.ndarray) -> None:
        """Ignores the tensors before it."""

    replace = {n: substitution(n, theirs, reached if n == name else passed) for n, theirs in tensors.items()}
    with contextlib.suppress(_Reached):
        model.forward(ids, trace=Trace(replace=replace, strict=False), chunk=len(ids))
    return result[0]
