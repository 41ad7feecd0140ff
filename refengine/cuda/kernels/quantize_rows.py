"""Converts rows of activations to the form that products read: bindings of kernels_cu/quantize_rows.cu."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from refengine.array import Array
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
from refengine.errors import KernelError

BLOCK = 32  # columns per stored sum
GROUP = 16  # columns of which a row's stats are known
PITCH = 256  # rows of halves are padded with zeros to a multiple of this


def padded(n_in: int) -> int:
    """The width of a row of halves for n_in columns."""
    return -(-n_in // PITCH) * PITCH


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm that is still to be applied to rows. weight: (n_in,) float32."""

    weight: Array
    eps: float


@dataclass(frozen=True)
class Rows:
    """n rows of activations, in one or both of two forms; None for arrays that do not exist.

    floats: (n, n_in) float32, for products with F32 and BF16 weights.
    halves, sums, scale: for all other products; halves (n, padded(n_in)) float16 in the device's column order, their
    block sums (n, padded(n_in) / 32), and scales (n,) float32. Products with few rows make this form themselves if
    there are only floats.
    norm: what these products apply to the floats before; the floats alone are then not the rows.
    stats: what they need for that: (n, n_in / 16, 2) float32, the largest magnitude, and the sum of squares, of each
    group of 16 floats.
    """

    n: int
    floats: Array | None
    halves: Array | None = None
    sums: Array | None = None
    scale: Array | None = None
    norm: RowNorm | None = field(default=None, kw_only=True)
    stats: Array | None = field(default=None, kw_only=True)

    @cached_property
    def struct(self) -> Struct:
        """The struct `Activations` of arguments.cuh."""
        if self.halves is not None:
            return Struct(self.halves, self.sums, self.scale, None, None, None)
        return Struct(None, None, None, self.floats, self.stats, None if self.norm is None else self.norm.weight)

    @property
    def eps(self) -> float:
        """The epsilon of the norm, or 0."""
        return self.norm.eps if self.norm else 0.0

    def check(self, tensor: str, n_in: int, *, floats: bool, few: bool = False) -> None:
        """Raises KernelError if the floats, or the halves, are missing or have another width than n_in.

        few: rows that the product itself converts are also right.
        """
        if few and self.halves is None and self.floats is not None and self.floats.shape == (self.n, n_in):
            if self.stats is None:
                raise KernelError(f"{tensor}: the product reads the stats of rows that it converts, found none")
            check_shape(tensor, "the rows' stats", self.stats, (self.n, n_in // GROUP, 2))
            return
        array, width = ((None if self.norm else self.floats), n_in) if floats else (self.halves, padded(n_in))
        if array is None or array.shape != (self.n, width):
            found = "none" if array is None else f"rows of the shape {array.shape}"
            kind = "floats" if floats else "halves"
            raise KernelError(f"{tensor}: the product reads {kind} of the shape {(self.n, width)}, found {found}")


def quantize_rows(kernels: Kernels, x: Array, rows: Rows, *, overlap: bool = False) -> None:
    """Compute the halves, sums and scales of `rows` from x (n, n_in) float32."""
    n, n_in = x.shape
    if n_in % BLOCK:
        raise KernelError(f"quantize_rows_f16: rows of {n_in} are not a multiple of {BLOCK}")
    check_shape("quantize_rows_f16", "the halves' array", rows.halves, (n, padded(n_in)))
    check_shape("quantize_rows_f16", "the sums' array", rows.sums, (n, padded(n_in) // BLOCK))
    check_shape("quantize_rows_f16", "the scales' array", rows.scale, (n,))
    threads = min(1024, max(64, n_in // 8 // 32 * 32))
    arguments = [x, rows.halves, rows.scale, rows.sums, n_in]
    kernels.launch("quantize_rows", "quantize_rows_f16", (n,), threads, arguments, overlap=overlap)
