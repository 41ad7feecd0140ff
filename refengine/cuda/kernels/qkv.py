"""Products with two or three matrices of the same type in one kernel, for few rows: bindings of kernels_cu/qkv.cu."""

from __future__ import annotations

from collections.abc import Sequence

from refengine.array import Array
from refengine.cuda.kernels.few_rows import FEW_ROWS, few_rows_launch
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import TILE_ROWS, PackedMatrix
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
from refengine.errors import KernelError

NO_MATRIX = Struct(None, None, None, None)


def n_together(n_rows: int, matrices: Sequence[PackedMatrix]) -> int:
    """How many of three matrices, from the first on, `qkv` can multiply at once: 0, 2 or 3."""
    q, k, v = matrices
    if n_rows > FEW_ROWS or q.is_float or q.type != k.type or q.shape[0] % TILE_ROWS or k.shape[0] % TILE_ROWS:
        return 0
    return 3 if v.type == k.type else 2


def qkv(kernels: Kernels, x: Rows, matrices: Sequence[PackedMatrix], biases: Sequence[Array | None], y: Array) -> None:
    """y (n_rows, n_out) float32: each row has its products with two or three matrices (·, n_in). Overlaps."""
    first = matrices[0]
    n_in, n_out = first.shape[1], sum(w.shape[0] for w in matrices)
    missing = 3 - len(matrices)
    if x.n > FEW_ROWS or any(w.type != first.type or w.shape[1] != n_in or w.is_float for w in matrices):
        found = [f"{w.type.name} {w.shape}" for w in matrices]
        raise KernelError(
            f"{first.name}: qkv needs at most {FEW_ROWS} rows and matrices of the same type, found {x.n} and {found}"
        )
    x.check(first.name, n_in, floats=False, few=True)
    check_shape(first.name, "the output", y, (x.n, n_out))
    for w, bias in zip(matrices, biases, strict=True):
        check_shape(w.name, "the bias", bias, (w.shape[0],))
    launch = few_rows_launch(kernels, first, n_out, x, x.n)
    structs = [w.struct for w in matrices] + [NO_MATRIX] * missing
    sizes = [first.shape[0], matrices[1].shape[0], n_out, n_in, x.n, *launch.arguments, x.eps]
    arguments = [*structs, x.struct, *biases, *[None] * missing, y, *sizes]
    kernel, shared = f"qkv_{first.type.name.lower()}", launch.shared_bytes
    kernels.launch("qkv", kernel, (launch.blocks, 1), launch.threads, arguments, shared, overlap=True, what=first.name)
