"""Products with quantised and F16 weights: bindings of kernels_cu/matmul.cu. `linear` also accepts F32 and BF16."""

from __future__ import annotations

from typing import Any

from refengine.array import Array
from refengine.cuda.kernels import few_rows, matmul_f32
from refengine.cuda.kernels.few_rows import FEW_ROWS
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import TILE_ROWS, PackedMatrix
from refengine.cuda.runtime.launch import Kernels

MANY_ROWS = 64  # rows per block of rows64_*


def linear(
    kernels: Kernels,
    x: Rows,
    w: PackedMatrix,
    y: Array,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    groups: Groups | None = None,
    overlap: bool = False,
    stats: Array | None = None,
) -> None:
    """y = x wᵀ + bias + residual; with groups, each row is multiplied with the matrix of its expert.

    x: in the form that w's type needs. w: (n_out, n_in), or (n_expert, n_out, n_in) with groups. y, residual: (n_rows,
    n_out) float32; bias: (n_out,), or (n_expert, n_out). stats: see `few_rows.multiply`; for few rows of quantised
    matrices only. The sums do not depend on the number of rows or the grouping.
    """
    n_out, n_in = w.shape[-2:]
    if not w.is_float and (groups.size if groups else x.n) <= FEW_ROWS:
        few_rows.multiply(kernels, x, (w,), (bias,), y, residual=residual, groups=groups, stats=stats)
        return
    x.check(w.name, n_in, floats=w.is_float)
    check_shape(w.name, "the output", y, (len(groups.y_rows) if groups else x.n, n_out))
    check_shape(w.name, "the bias", bias, w.shape[:-1])
    check_shape(w.name, "the residual", residual, y.shape)
    if w.is_float:
        matmul_f32.linear(kernels, x, w, y, bias=bias, residual=residual, groups=groups, overlap=overlap)
        return
    struct = groups.struct if groups else NO_GROUPS
    arguments: list[Any] = [w.data, x.struct, struct, bias, residual, y, n_out, n_in, x.n]
    grid = (-(-n_out // (4 * TILE_ROWS)), len(groups.group) if groups else -(-x.n // MANY_ROWS))
    kernels.launch("matmul", f"rows64_{w.type.name.lower()}", grid, 128, arguments, what=w.name)


def group_size(w: PackedMatrix, n_pairs: int) -> int:
    """How many pairs of one expert a product with w (n_expert, n_out, n_in) computes together."""
    return FEW_ROWS if w.is_float or n_pairs <= FEW_ROWS * w.shape[0] else MANY_ROWS
