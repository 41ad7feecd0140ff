"""Aligns another engine's tensors with ours: recognises their layout before anything is computed.

Engines store the same values in different layouts: with heads merged or separate, axes swapped, score rows padded to
the cache's size, or in the last layer only the rows whose logits are needed. If the shape is ambiguous (a square matrix
may be transposed), the values decide: another axis order is used only if its values are near ours and those of the
plain order are far from ours.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refengine.errors import TraceError
from refengine.trace import to_numpy
from refengine.validate.metrics import nmse

SCORES = ("kq-", "kq_soft_max-")  # the peer pads these to its cache's size; columns after the prompt are dropped
HEADS_FIRST = (*SCORES, "kq_exp-", "kqv-")  # (n_head, n_tokens, …)
FAR, NEAR = 0.5, 0.05  # NMSE; for unrelated values it is 2, for a float16 engine's values less than 0.001


def align(name: str, peer: np.ndarray, ours: np.ndarray, *, rows_cut: bool = False) -> tuple[np.ndarray, str]:
    """The peer's tensor in our shape, or if `rows_cut` allows with only the last rows; and a note.

    The note describes any change other than merging or splitting heads; otherwise it is empty.
    Raises `TraceError` for a size that fits no layout.
    """
    shape = ours.shape
    if name.startswith(SCORES) and peer.ndim == ours.ndim and peer.shape[-1] > shape[-1]:
        peer = peer[..., : shape[-1]]
    note, axis = "", row_axis(name)
    if rows_cut and 0 < peer.size < ours.size and peer.size % (ours.size // shape[axis]) == 0:
        n_rows = peer.size // (ours.size // shape[axis])
        note = f"the last {n_rows} of {shape[axis]} rows"
        ours = _last_rows(ours, axis, n_rows)
        shape = ours.shape
    if peer.size != math.prod(shape):
        raise TraceError(f"tensor {name}: ours is {shape}, the peer's {peer.shape}")
    orders = [o for o in itertools.permutations(range(len(shape))) if _merges([shape[i] for i in o], peer.shape)]
    plain = tuple(range(len(shape)))
    if not orders:  # the same number of values, divided differently: read them in order
        return peer.reshape(shape), note
    best = orders[0]
    if len(orders) > 1 or best != plain:
        distance = {order: _distance(_in_order(peer, shape, order), ours) for order in orders}
        nearest = min(orders, key=lambda order: distance[order])
        unlike = plain not in distance or distance[plain] > FAR
        best = nearest if unlike and distance[nearest] < NEAR else plain if plain in distance else orders[0]
    if best != plain:
        note = ", ".join(filter(None, [note, f"axes in the order {best}"]))
    return _in_order(peer, shape, best), note


def may_be_cut(name: str, n_layer: int) -> bool:
    """Whether engines may omit rows of this tensor on which no needed logits depend: in the last layer and after it."""
    return name.startswith("result_") or name.partition("#")[0].endswith(f"-{n_layer - 1}")


def part_of(name: str, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The rows of our tensor that an aligned tensor has: all, or the last ones."""
    axis = row_axis(name)
    return _last_rows(ours, axis, theirs.shape[axis]) if theirs.ndim else ours


def put_into(name: str, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Our tensor, with the rows that an aligned tensor has replaced by it."""
    axis = row_axis(name)
    first = ours.shape[axis] - theirs.shape[axis]
    if first == 0:
        return theirs
    kept = ours[:, :first] if axis else ours[:first]
    return np.concatenate([kept, theirs.astype(ours.dtype)], axis=axis)


def substitution(name: str, theirs: np.ndarray, look: Callable[[np.ndarray], None]) -> Callable[[Any], np.ndarray]:
    """A function for `Trace`'s replace: calls `look` with our rows that an aligned tensor has, and substitutes it."""

    def replacement(ours: Any) -> np.ndarray:
        values = to_numpy(ours)
        look(part_of(name, values, theirs))
        return put_into(name, values, theirs)

    return replacement


def row_axis(name: str) -> int:
    """The axis of our tensor that has the prompt's positions."""
    return 1 if name.startswith(HEADS_FIRST) else 0


def _last_rows(x: np.ndarray, axis: int, n: int) -> np.ndarray:
    return x[:, x.shape[1] - n :] if axis else x[len(x) - n :]


def _merges(lengths: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether `shape` is `lengths` with neighbours merged or split; lengths of 1 are ignored."""
    ours, theirs = (set(itertools.accumulate(sizes, operator.mul, initial=1)) for sizes in (lengths, shape))
    return ours <= theirs or theirs <= ours


def _in_order(peer: np.ndarray, shape: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """Transpose `peer`, which has our axes in this order, to our order."""
    return peer.reshape([shape[i] for i in order]).transpose(np.argsort(order))


def _distance(value: np.ndarray, reference: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        distance = nmse(value, reference)
    return distance if math.isfinite(distance) else math.inf
