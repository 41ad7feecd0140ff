"""The first half of a feed-forward in one kernel, for few rows: bindings of kernels_cu/gate_up.cu. They overlap."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.few_rows import FEW_ROWS, few_rows_launch
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError


def fits(gate: PackedMatrix, up: PackedMatrix, n_together: int) -> bool:
    """Whether `gate_up` supports these matrices: quantised, of the same type and shape, and for at most 8 rows.

    n_together: the number of rows, or the size of groups.
    """
    return gate.type == up.type and gate.shape == up.shape and not gate.is_float and n_together <= FEW_ROWS


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
    """y = swiglu(x gateᵀ + bias, x upᵀ + bias), or swiglu_clamped.

    y: (n_rows, n_ff) float32; with groups, it has one row per pair.
    """
    n_out, n_in = gate.shape[-2:]
    if not fits(gate, up, groups.size if groups else x.n):
        found = f"{gate.type.name} {gate.shape} and {up.type.name} {up.shape} for {x.n} rows"
        raise KernelError(f"{gate.name}: gate_up needs quantised matrices of the same type and shape, found {found}")
    x.check(gate.name, n_in, floats=False, few=True)
    check_shape(gate.name, "the output", y, (len(groups.y_rows) if groups else x.n, n_out))
    for w, bias in zip((gate, up), biases, strict=True):
        check_shape(w.name, "the bias", bias, w.shape[:-1])
    n_groups = len(groups.group) if groups else 1
    n_rows = groups.most if groups else x.n
    launch = few_rows_launch(kernels, gate, n_out, x, n_rows, n_groups, n_matrices=2)
    struct = groups.struct if groups else NO_GROUPS
    sizes = [n_out, n_in, len(y), clamped, *launch.arguments, x.eps]
    arguments = [gate.struct, up.struct, x.struct, struct, *biases, y, *sizes]
    kernel, grid, shared = f"gate_up_{gate.type.name.lower()}", (launch.blocks, n_groups), launch.shared_bytes
    kernels.launch("gate_up", kernel, grid, launch.threads, arguments, shared, overlap=True, what=gate.name)


def up_gelu(kernels: Kernels, x: Rows, up: PackedMatrix, y: Array, bias: Array | None = None) -> None:
    """y = gelu(x upᵀ + bias), for quantised weights and at most 8 rows. y: (n_rows, n_ff) float32."""
    n_out, n_in = up.shape
    if up.is_float or x.n > FEW_ROWS:
        found = f"{x.n} rows and {up.type.name}"
        raise KernelError(f"{up.name}: up_gelu needs quantised weights and at most {FEW_ROWS} rows, found {found}")
    x.check(up.name, n_in, floats=False, few=True)
    check_shape(up.name, "the output", y, (x.n, n_out))
    check_shape(up.name, "the bias", bias, (n_out,))
    launch = few_rows_launch(kernels, up, n_out, x, x.n)
    arguments = [up.struct, x.struct, bias, y, n_out, n_in, x.n, *launch.arguments, x.eps]
    kernel, shared = f"up_gelu_{up.type.name.lower()}", launch.shared_bytes
    kernels.launch("gate_up", kernel, (launch.blocks, 1), launch.threads, arguments, shared, overlap=True, what=up.name)
