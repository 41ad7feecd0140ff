"""Products with F32 and BF16 weights: bindings of kernels_cu/matmul_f32.cu. Call `kernels.matmul.linear`."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels

ROWS = 8  # rows per block


def linear(
    kernels: Kernels,
    x: Rows,
    w: PackedMatrix,
    y: Array,
    *,
    bias: Array | None,
    residual: Array | None,
    groups: Groups | None,
    overlap: bool,
) -> None:
    """Like `matmul.linear`, with the floats of the rows."""
    n_out, n_in = w.shape[-2:]
    n_groups = len(groups.group) if groups else -(-x.n // ROWS)
    struct = groups.struct if groups else NO_GROUPS
    arguments = [w.float_rows, x.floats, struct, bias, residual, y, n_out, n_in, x.n]
    kernel, grid = f"rows8_{w.type.name.lower()}", (-(-n_out // 8), n_groups)
    kernels.launch("matmul_f32", kernel, grid, 256, arguments, overlap=overlap, what=w.name)
