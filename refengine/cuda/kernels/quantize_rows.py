"""Converts rows of activations to the form that products read: bindings of kernels_cu/quantize_rows.cu."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from refengine.array import Array
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
from refengine.errors import KernelError
from refengine.ops.integers import SEGMENT

BLOCK = 32  # columns of which all rows are a multiple
GROUP = 16  # columns per stored sum, and per sum of squares
MOST_WARPS = 8  # of a block, each with a segment


def n_segments(n_in: int) -> int:
    """The number of segments of a row of n_in columns."""
    return -(-n_in // SEGMENT)


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm that is still to be applied to rows. weight: (n_in,) float32."""

    weight: Array
    eps: float


@dataclass(frozen=True)
class Converted:
    """n rows in the form that products with quantised weights, or with halves, read: see kernels_cu/quantize_rows.cu.

    data: (n, n_segments, 512) uint8, integers of two bytes or halves, in the device's order of columns. sums: (n,
    n_segments, 16) int32, the sums of the integers of 16 columns. scale: (n, n_segments) float32.
    """

    halves: bool
    data: Array
    sums: Array
    scale: Array

    @staticmethod
    def shapes(n: int, n_in: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of data, sums and scale of n rows of n_in columns."""
        whole = (n, n_segments(n_in))
        return (*whole, 2 * SEGMENT), (*whole, SEGMENT // GROUP), whole

    @classmethod
    def empty(cls, xp: Any, n: int, n_in: int, *, halves: bool) -> Converted:
        """Space for n rows of n_in columns."""
        data, sums, scale = cls.shapes(n, n_in)
        return cls(halves, xp.empty(data, xp.uint8), xp.empty(sums, xp.int32), xp.empty(scale, xp.float32))

    def check(self, what: str, n: int, n_in: int) -> None:
        """Raises KernelError, with what they are for, if the arrays are not those of n rows of n_in columns."""
        names = ("the rows' array", "the sums' array", "the scales' array")
        arrays = (self.data, self.sums, self.scale)
        for name, array, shape in zip(names, arrays, self.shapes(n, n_in), strict=True):
            check_shape(what, name, array, shape)


@dataclass(frozen=True)
class Rows:
    """n rows of activations, in one or both of two forms; None for what does not exist.

    floats: (n, n_in) float32, for products with F32 and BF16 weights.
    converted: for all other products. Products with few rows make this form themselves if there are only floats.
    norm: what these products apply to the floats before; the floats alone are then not the rows.
    squares: what they need for that, (n, n_in / 16) float32: the sum of squares of each group of 16 floats.
    """

    n: int
    floats: Array | None
    converted: Converted | None = None
    norm: RowNorm | None = field(default=None, kw_only=True)
    squares: Array | None = field(default=None, kw_only=True)

    @cached_property
    def struct(self) -> Struct:
        """The struct `Activations` of arguments.cuh."""
        if self.converted is not None:
            return Struct(self.converted.data, self.converted.sums, self.converted.scale, None, None, None)
        return Struct(None, None, None, self.floats, self.squares, None if self.norm is None else self.norm.weight)

    @property
    def eps(self) -> float:
        """The epsilon of the norm, or 0."""
        return self.norm.eps if self.norm else 0.0

    def check_floats(self, tensor: str, n_in: int) -> None:
        """Raises KernelError unless there are floats (n, n_in) without a norm to be applied."""
        floats = None if self.norm else self.floats
        if floats is None or floats.shape != (self.n, n_in):
            found = "none" if floats is None else f"rows of the shape {floats.shape}"
            raise KernelError(f"{tensor}: the product reads floats of the shape {(self.n, n_in)}, found {found}")

    def check_norm(self, what: str, n_in: int) -> None:
        """Raises KernelError if there is a norm of n_in columns to be applied, but not what that needs."""
        if self.norm is None:
            return
        if self.squares is None:
            raise KernelError(f"{what}: a norm reads the squares of its rows, found none")
        check_shape(what, "the rows' squares", self.squares, (self.n, n_in // GROUP))
        check_shape(what, "the norm's weight", self.norm.weight, (n_in,))

    def check_converted(self, tensor: str, n_in: int, *, halves: bool, few: bool = False) -> None:
        """Raises KernelError unless there are converted rows of n_in columns, of halves or of integers.

        few: rows that the product itself converts are also right.
        """
        if self.converted is not None and self.converted.halves == halves:
            self.converted.check(tensor, self.n, n_in)
            return
        if few and self.converted is None and self.floats is not None:
            check_shape(tensor, "the rows' array", self.floats, (self.n, n_in))
            self.check_norm(tensor, n_in)
            return
        wanted, other = ("halves", "integers") if halves else ("integers", "halves")
        raise KernelError(f"{tensor}: the product reads {wanted}, found {other if self.converted else 'none'}")


def quantize_rows(kernels: Kernels, rows: Rows, to: Converted, *, overlap: bool = False) -> None:
    """Convert rows of floats (n, n_in), after their norm, if they have one.

    Raises KernelError for other shapes, and if a norm's squares are missing.
    """
    if rows.floats is None:
        raise KernelError("quantize_rows: there are no floats to convert")
    n, n_in = rows.floats.shape
    if n_in % BLOCK:
        raise KernelError(f"quantize_rows: rows of {n_in} are not a multiple of {BLOCK}")
    to.check("quantize_rows", n, n_in)
    rows.check_norm("quantize_rows", n_in)
    warps = min(MOST_WARPS, n_segments(n_in))
    grid = (n, -(-n_segments(n_in) // warps))
    weight = None if rows.norm is None else rows.norm.weight
    outputs = (to.data, to.scale, to.sums, n_in, int(to.halves), float(rows.eps))
    arguments = [rows.floats, rows.squares, weight, *outputs]
    kernels.launch("quantize_rows", "quantize_rows", grid, 32 * warps, arguments, overlap=overlap)
