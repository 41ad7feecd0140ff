"""Rows of activations as products take them: bindings of kernels_cu/quantize_rows.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from refengine.array import Array
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct

BLOCK = 32  # columns whose sum is kept


@dataclass(frozen=True)
class Rows:
    """n rows of activations. What a product with F32 or BF16 weights reads: floats (n, n_in) float32. What every other
    reads: halves (n, n_in) float16 in the device's order, their block sums (n, n_in / 32) and scales (n,) float32.

    None: not made.
    """

    n: int
    floats: Array | None
    halves: Array | None = None
    sums: Array | None = None
    scale: Array | None = None

    @cached_property
    def struct(self) -> Struct:
        """`Activations` of arguments.cuh."""
        return Struct(self.halves, self.sums, self.scale)


def quantize_rows(kernels: Kernels, x: Array, rows: Rows, *, overlap: bool = False) -> None:
    """Write the halves, sums and scales of `rows` from x (n, n_in) float32."""
    n, n_in = x.shape
    threads = min(1024, max(64, n_in // 8 // 32 * 32))
    arguments = [x, rows.halves, rows.scale, rows.sums, n_in]
    kernels.launch("quantize_rows", "quantize_rows_f16", (n,), threads, arguments, overlap=overlap)
