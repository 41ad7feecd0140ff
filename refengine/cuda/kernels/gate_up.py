"""The first half of a feed-forward in one kernel, for few rows: bindings of kernels_cu/gate_up.cu. They overlap."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.matmul import FEW_ROWS, SEGMENT, narrow_launch
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels


def fits(x: Rows, gate: PackedMatrix, up: PackedMatrix, groups: Groups | None = None) -> bool:
    """Whether `gate_up` takes them: quantised matrices of one type and shape, at most 8 rows, or groups of 8."""
    few = groups.size == FEW_ROWS if groups else x.n <= FEW_ROWS
    return gate.type == up.type and gate.shape == up.shape and not gate.is_float and few


def gate_up(
    kernels: Kernels,
    x: Rows,
    gate: PackedMatrix,
    up: PackedMatrix,
    y: Array,
    *,
    biases: tuple[Array | None, Array | None] = (None, None),
    groups: Groups | None = None,
    clamped: bool = False,
) -> None:
    """y = swiglu(x gateᵀ + bias, x upᵀ + bias), or swiglu_clamped. y: (n_rows, n_ff) float32, n_rows pairs with groups.
    """
    n_out, n_in = gate.shape[-2:]
    n_groups = len(groups.group) if groups else 1
    n_segments = -(-n_in // SEGMENT)
    blocks, warps = narrow_launch(kernels, gate, n_out, 2 * n_segments, n_groups)
    struct = groups.struct if groups else NO_GROUPS
    arguments = [gate.struct, up.struct, x.struct, struct, *biases, y, n_out, n_in, len(y), clamped]
    kernel, grid, shared = f"gate_up_{gate.type.name.lower()}", (blocks, n_groups), 2048 * n_segments
    kernels.launch("gate_up", kernel, grid, 32 * warps, arguments, shared, overlap=True, what=gate.name)


def up_gelu(kernels: Kernels, x: Rows, up: PackedMatrix, y: Array, bias: Array | None = None) -> None:
    """y = gelu(x upᵀ + bias), of quantised weights and at most 8 rows. y: (n_rows, n_ff) float32."""
    n_out, n_in = up.shape
    n_segments = -(-n_in // SEGMENT)
    blocks, warps = narrow_launch(kernels, up, n_out, n_segments, 1)
    arguments = [up.struct, x.struct, bias, y, n_out, n_in, x.n]
    kernel, shared = f"up_gelu_{up.type.name.lower()}", 1024 * n_segments
    kernels.launch("gate_up", kernel, (blocks, 1), 32 * warps, arguments, shared, overlap=True, what=up.name)
