"""Another engine's tensors in our axis order: layouts are recognised before anything is computed.

Engines hold the same values differently: heads merged or apart, axes swapped, score rows padded to the cache's size,
and in the last layer only the rows whose logits are wanted. What a shape leaves open (a square one may be transposed)
is settled by the values: another order is taken only where the plain one is far from what we get and that one is near.
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

SCORES = ("kq-", "kq_soft_max-")  # the peer pads these to its cache; columns past the prompt are not part of the model
HEADS_FIRST = (*SCORES, "kq_exp-", "kqv-")  # (n_head, n_tokens, …)
FAR, NEAR = 0.5, 0.05  # NMSE: unrelated values are 2 apart, those of a float16 engine less than 0.001


def align(name: str, peer: np.ndarray, ours: np.ndarray, *, rows_cut: bool = False) -> tuple[np.ndarray, str]:
    """The peer's tensor in the shape of ours, or with fewer rows (the last ones) where `rows_cut` allows; and a note.

    The note says in words what was done that is more than merging or splitting heads; else it is empty.
    Raises `TraceError` for a size that no layout explains.
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
    if not orders:  # as many values, cut otherwise: read in order
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
    """Whether engines leave rows of this tensor out that no wanted logits depend on: in the last layer and after it."""
    return name.startswith("result_") or name.partition("#")[0].endswith(f"-{n_layer - 1}")


def part_of(name: str, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Those rows of ours that an aligned tensor has: all, or the last ones."""
    axis = row_axis(name)
    return _last_rows(ours, axis, theirs.shape[axis]) if theirs.ndim else ours


def put_into(name: str, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Ours with those rows taken from an aligned tensor."""
    axis = row_axis(name)
    first = ours.shape[axis] - theirs.shape[axis]
    if first == 0:
        return theirs
    kept = ours[:, :first] if axis else ours[:first]
    return np.concatenate([kept, theirs.astype(ours.dtype)], axis=axis)


def substitution(name: str, theirs: np.ndarray, look: Callable[[np.ndarray], None]) -> Callable[[Any], np.ndarray]:
    """For `Trace`'s replace: shows `look` the rows of ours that an aligned tensor has, and goes on with that tensor."""

    def replacement(ours: Any) -> np.ndarray:
        values = to_numpy(ours)
        look(part_of(name, values, theirs))
        return put_into(name, values, theirs)

    return replacement


def row_axis(name: str) -> int:
    """The axis of our tensor along which the prompt's positions lie."""
    return 1 if name.startswith(HEADS_FIRST) else 0


def _last_rows(x: np.ndarray, axis: int, n: int) -> np.ndarray:
    return x[:, x.shape[1] - n :] if axis else x[len(x) - n :]


def _merges(lengths: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether `shape` is `lengths` with neighbours merged or split; lengths of 1 do not count."""
    ours, theirs = (set(itertools.accumulate(sizes, operator.mul, initial=1)) for sizes in (lengths, shape))
    return ours <= theirs or theirs <= ours


def _in_order(peer: np.ndarray, shape: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """`peer` holds our axes in this order: put them back into ours."""
    return peer.reshape([shape[i] for i in order]).transpose(np.argsort(order))


def _distance(value: np.ndarray, reference: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        found = nmse(value, reference)
    return found if math.isfinite(found) else math.inf
