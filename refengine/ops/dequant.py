"""Float values of stored weight matrices, and the bounded cache that keeps them.

On the CPU the cache is filled in threads when a model is loaded. Each thread writes its own blocks of rows, so the
values do not depend on the number of threads. A matrix that is not in the cache is dequantised at its first use if it
fits into the cache, otherwise at every use, so that a model that is larger than memory as float32 still runs. Matrices
are never evicted, because layers are used in a fixed cycle, for which this is better than least recently used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.array import Array

StoredMatrix = Any  # .name, .type, .shape (..., n_out, n_in), .rows(start, stop) -> raw bytes

BLOCK_ELEMENTS = 1 << 20  # how many elements a thread dequantises at a time: 4 MiB as float32


@dataclass(frozen=True)
class Dequantized:
    """The result of filling a cache: the number of dequantised weights, their bytes, and the time in seconds."""

    n_weights: int
    n_bytes: int
    seconds: float


def float_rows(xp: Any, w: StoredMatrix, start: int, stop: int, dtype: Any) -> Array:
    """Rows start..stop, counted over all experts, dequantised: (stop - start, n_in)."""
    values = quants.dequantize(xp, w.rows(start, stop), w.type, (stop - start, w.shape[-1]))
    return values.astype(dtype, copy=False)


def usable_cpus() -> int:
    """The number of processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # exists on Linux, but not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class DequantCache:
    """Float values of weight matrices, up to `budget` bytes, by matrix name and rows."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.n_bytes = 0
        self._values: dict[tuple[str, int, int], Array] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        """Whether values of the matrix with this name are kept."""
        return any(known == name for known, _, _ in self._values)

    def get(self, xp: Any, w: StoredMatrix, start: int, stop: int, dtype: Any) -> Array | None:
        """Rows start..stop as (stop - start, n_in) `dtype`, or None if they do not fit into the cache."""
        key = (w.name, start, stop)
        values = self._values.get(key)
        if values is None:
            n_bytes = (stop - start) * w.shape[-1] * np.dtype(dtype).itemsize
            if self.n_bytes + n_bytes > self.budget:
                return None
            values = self._values[key] = float_rows(xp, w, start, stop, dtype)
            self.n_bytes += n_bytes
        return values

    def fill(
        self,
        matrices: Iterable[StoredMatrix],
        dtype: Any,
        progress: Callable[[int, int], None] = lambda done, total: None,
        n_threads: int | None = None,
    ) -> Dequantized:
        """Dequantise NumPy matrices that are not in the cache yet, before their first use.

        A matrix that does not fit is skipped. Matrices of experts (three axes) are stored expert by expert, and only if
        all experts of all matrices fit; otherwise an expert is dequantised when the router chooses it.
        progress(weights_done, weights_total) is called after each block of rows, in the thread that calls `fill`.
        n_threads: the default is one per usable processor. If a block fails, its error is raised and nothing is kept.
        """
        start_s = time.perf_counter()
        chosen = self._chosen(matrices, np.dtype(dtype).itemsize)
        values: dict[tuple[str, int, int], Array] = {}
        blocks: list[tuple[StoredMatrix, int, int, Array]] = []
        for w in chosen:
            n_out, n_in = w.shape[-2:]
            step = max(1, BLOCK_ELEMENTS // n_in)
            for first in range(0, prod(w.shape[:-1]), n_out):
                if w.type == GGMLQuantizationType.F32 and dtype == np.float32:  # a view of the stored values
                    values[w.name, first, first + n_out] = float_rows(np, w, first, first + n_out, dtype)
                    continue
                out = values[w.name, first, first + n_out] = np.empty((n_out, n_in), dtype)
                for row in range(0, n_out, step):
                    part = out[row : row + step]
                    blocks.append((w, first + row, first + row + len(part), part))
        total, done = sum(part.size for *_, part in blocks), 0
        pool = ThreadPoolExecutor(n_threads or usable_cpus(), "dequantise")
        try:
            for written in [pool.submit(_write_rows, *block) for block in blocks]:
                done += written.result()
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)  # do not wait for all blocks after an error or interruption
        n_bytes = sum(prod(w.shape) for w in chosen) * np.dtype(dtype).itemsize
        self._values.update(values)
        self.n_bytes += n_bytes
        return Dequantized(total, n_bytes, time.perf_counter() - start_s)

    def _chosen(self, matrices: Iterable[StoredMatrix], itemsize: int) -> list[StoredMatrix]:
        """The matrices to fill the cache with: those with two axes that fit, then the experts if all of them do."""
        known = {name for name, _, _ in self._values}
        new = list({w.name: w for w in matrices if w.name not in known}.values())
        left = self.budget - self.n_bytes
        chosen = []
        for w in new:
            n_bytes = prod(w.shape) * itemsize
            if len(w.shape) == 2 and n_bytes <= left:
                chosen.append(w)
                left -= n_bytes
        experts = [w for w in new if len(w.shape) > 2]
        return chosen + experts if sum(prod(w.shape) for w in experts) * itemsize <= left else chosen


def _write_rows(w: StoredMatrix, start: int, stop: int, out: Array) -> int:
    """Dequantise rows start..stop into `out`; returns the number of elements."""
    rows = w.rows(start, stop)
    if out.dtype == np.float32:
        quants.dequantize(np, rows, w.type, out.shape, out)
    else:
        out[...] = quants.dequantize(np, rows, w.type, out.shape)
    return out.size
