"""Weights from the file to the device: in bounded slabs, re-ordered there (`layout.pack`) into their arena.

At no time is more of a matrix in host memory than a slab, and nowhere is any of it in floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, pack, plane_bytes
from refengine.cuda.memory import Arena, aligned
from refengine.weights import CHUNK_BYTES, Matrix, read

SLAB_BYTES = 16 << 20  # of a matrix re-ordered at a time


def bytes_for(matrices: Iterable[tuple[Any, tuple[int, ...]]], vectors: Iterable[int]) -> int:
    """What an arena needs for matrices of (type, shape) and vectors of so many bytes."""
    planes = sum(aligned(n) for kind, shape in matrices for n in plane_bytes(kind, shape).values())
    return planes + sum(aligned(n) for n in vectors)


class Described:
    """A `weights.Placement` that leaves matrices in the file: what is known of them without a device."""

    in_place = False

    def vector(self, values: np.ndarray) -> Array:
        return values

    def matrix(self, w: Matrix, done: Callable[[int], None] = lambda n: None) -> PackedMatrix:
        return PackedMatrix(w.name, w.type, tuple(w.shape), {})


class Uploader:
    """Puts matrices and vectors into an arena: a `weights.Placement`."""

    in_place = False

    def __init__(self, xp: Any, arena: Arena, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._xp, self._arena, self._chunk = xp, arena, chunk_bytes

    def vector(self, values: np.ndarray) -> Array:
        place = self._arena.take(values.shape, np.float32)
        place[...] = self._xp.asarray(values)
        return place

    def matrix(self, w: Matrix, done: Callable[[int], None] = lambda n: None) -> PackedMatrix:
        """w.data on the host, or not yet read → planes on the device. Raises ModelError as `pack` does."""
        planes = {name: self._arena.take((n,), np.uint8) for name, n in plane_bytes(w.type, w.shape).items()}
        filled = dict.fromkeys(planes, 0)
        n_out = w.shape[-2]
        row_bytes = w.data.shape[0] // int(np.prod(w.shape[:-1]))
        step = max(1, SLAB_BYTES // (row_bytes * TILE_ROWS)) * TILE_ROWS
        for expert in range(int(np.prod(w.shape[:-2], dtype=np.int64))):
            for first in range(0, n_out, step):
                stop = min(first + step, n_out)
                raw = read(self._xp, w.rows(expert * n_out + first, expert * n_out + stop), self._chunk)
                slab = pack(self._xp, Matrix(w.name, w.type, (stop - first, w.shape[-1]), raw))
                for name, plane in slab.planes.items():
                    planes[name][filled[name] : filled[name] + plane.nbytes] = plane
                    filled[name] += plane.nbytes
                done(int(raw.nbytes))
        return PackedMatrix(w.name, w.type, tuple(w.shape), planes)
