"""Rows of the embedding matrix: bindings of kernels_cu/embedding.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.quantize_rows import GROUP
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
from refengine.errors import KernelError


def embedding(kernels: Kernels, w: PackedMatrix, ids: Array, y: Array, squares: Array | None = None) -> None:
    """y[t] = row ids[t] of w, dequantised. ids: (n,) int32, each below the number of rows; y: (n, n_in) float32.

    squares: is filled with those of y, see `quantize_rows.Rows`; not for a matrix of floats. Raises KernelError for
    what does not fit.
    """
    n_in = w.shape[-1]
    check_shape(w.name, "the rows' array", y, (len(ids), n_in))
    check_shape(w.name, "the squares' array", squares, (len(ids), n_in // GROUP))
    if squares is not None and w.is_float:
        raise KernelError(f"{w.name}: rows of {w.type.name} are stored as they are, so their squares are not computed")
    kernel = f"embedding_{w.type.name.lower()}"
    matrix: Array | Struct
    if w.is_float:
        grid: tuple[int, ...] = (len(ids),)
        threads, matrix = 128, w.float_rows
    else:
        grid = (len(ids), -(-n_in // 256))
        threads, matrix = 32, w.data
    arguments = [matrix, ids, y, n_in] if w.is_float else [matrix, ids, y, squares, n_in]
    kernels.launch("embedding", kernel, grid, threads, arguments, what=w.name)


def take_rows(kernels: Kernels, x: Array, rows: Array, y: Array) -> None:
    """y[t] = x[rows[t]]. x (n, width), y (n_rows, width) float32; rows: (n_rows,) int32, each below n."""
    check_shape("take_rows", "the output", y, (len(rows), x.shape[1]))
    kernels.launch("embedding", "embedding_f32", (len(rows),), 128, [x, rows, y, x.shape[1]])
