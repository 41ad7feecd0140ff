"""Copies weights from the file to the device in slabs of limited size, and reorders them there (`layout.pack`).

At most one slab of a matrix is in host memory at any time, and weights are never converted to floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, pack, packed_bytes
from refengine.cuda.memory import ALIGNMENT, Arena, aligned
from refengine.weights import CHUNK_BYTES, Matrix, read

SLAB_BYTES = 16 << 20  # how much of a matrix is reordered at a time


def bytes_for(matrices: Iterable[tuple[Any, tuple[int, ...]]], vectors: Iterable[int]) -> int:
    """The bytes of an arena for matrices, given as (type, shape), and vectors, given by their bytes."""
    packed = sum(aligned(packed_bytes(kind, shape)) for kind, shape in matrices)
    return packed + sum(aligned(n) for n in vectors)


def together(xp: Any, arrays: Sequence[np.ndarray]) -> list[Array]:
    """Copies of arrays of integers on the device, as int32, in one transfer. Each begins at a multiple of 256 bytes."""
    step = ALIGNMENT // np.dtype(np.int32).itemsize
    starts = [0, *accumulate(-(-array.size // step) * step for array in arrays)]
    whole = np.zeros(starts[-1], np.int32)
    for start, array in zip(starts, arrays, strict=False):
        whole[start : start + array.size] = array.reshape(-1)
    copied = xp.asarray(whole)
    parts = zip(starts, arrays, strict=False)
    return [copied[start : start + array.size].reshape(array.shape) for start, array in parts]


class Described:
    """A `weights.Placement` that reads no matrices: it only gives their names, types and shapes, without a device."""

    in_place = False

    def vector(self, values: np.ndarray) -> Array:
        return values

    def matrix(self, w: Matrix, done: Callable[[int], None] = lambda n: None) -> PackedMatrix:
        return PackedMatrix(w.name, w.type, tuple(w.shape), np.empty(0, np.uint8))


class Uploader:
    """A `weights.Placement` that puts matrices and vectors into an arena."""

    in_place = False

    def __init__(self, xp: Any, arena: Arena, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._xp, self._arena, self._chunk = xp, arena, chunk_bytes

    def vector(self, values: np.ndarray) -> Array:
        place = self._arena.take(values.shape, np.float32)
        place[...] = self._xp.asarray(values)
        return place

    def matrix(self, w: Matrix, done: Callable[[int], None] = lambda n: None) -> PackedMatrix:
        """Copy a matrix, on the host or not yet read, to the device. Raises the errors of `pack`."""
        data = self._arena.take((packed_bytes(w.type, w.shape),), np.uint8)
        filled = 0
        n_out = w.shape[-2]
        row_bytes = w.data.shape[0] // int(np.prod(w.shape[:-1]))
        step = max(1, SLAB_BYTES // (row_bytes * TILE_ROWS)) * TILE_ROWS
        for expert in range(int(np.prod(w.shape[:-2], dtype=np.int64))):
            for first in range(0, n_out, step):
                stop = min(first + step, n_out)
                raw = read(self._xp, w.rows(expert * n_out + first, expert * n_out + stop), self._chunk)
                slab = pack(self._xp, Matrix(w.name, w.type, (stop - first, w.shape[-1]), raw))
                data[filled : filled + slab.n_bytes] = slab.data
                filled += slab.n_bytes
                done(int(raw.nbytes))
        return PackedMatrix(w.name, w.type, tuple(w.shape), data)
