"""Rows of the embedding matrix: bindings of kernels_cu/embedding.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct


def embedding(kernels: Kernels, w: PackedMatrix, ids: Array, y: Array) -> None:
    """y[t] = row ids[t] of w, dequantised. ids: (n,) int32, each below the number of rows; y: (n, n_in) float32."""
    n_in = w.shape[-1]
    check_shape(w.name, "the rows' array", y, (len(ids), n_in))
    kernel = f"embedding_{w.type.name.lower()}"
    matrix: Array | Struct
    if w.is_float:
        grid: tuple[int, ...] = (len(ids),)
        threads, matrix = 128, w.float_rows
    else:
        grid = (len(ids), -(-n_in // 256))
        threads, matrix = 32, w.data
    kernels.launch("embedding", kernel, grid, threads, [matrix, ids, y, n_in], what=w.name)


def take_rows(kernels: Kernels, x: Array, rows: Array, y: Array) -> None:
    """y[t] = x[rows[t]]. x (n, width), y (n_rows, width) float32; rows: (n_rows,) int32, each below n."""
    check_shape("take_rows", "the output", y, (len(rows), x.shape[1]))
    kernels.launch("embedding", "embedding_f32", (len(rows),), 128, [x, rows, y, x.shape[1]])
