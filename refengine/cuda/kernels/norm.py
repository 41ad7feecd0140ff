"""Norms over rows: bindings of kernels_cu/norm.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.quantize_rows import GROUP, Rows
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError

THREADS = 256


def rms_norm(kernels: Kernels, x: Array, weight: Array, eps: float, y: Array) -> None:
    """y = x / √(mean(x²) + eps) · weight. x, y: (..., n) float32; weight: (n,) float32."""
    _norm(kernels, "rms_norm_f32", x, [weight], eps, y)


def layer_norm(kernels: Kernels, x: Array, weight: Array, bias: Array, eps: float, y: Array) -> None:
    """y = (x - mean) / √(variance + eps) · weight + bias. x, y: (..., n) float32; weight, bias: (n,) float32."""
    _norm(kernels, "layer_norm_f32", x, [weight, bias], eps, y)


def _norm(kernels: Kernels, kernel: str, x: Array, vectors: list[Array], eps: float, y: Array) -> None:
    n = _width(kernel, x, vectors)
    check_shape(kernel, "the output", y, x.shape)
    kernels.launch("norm", kernel, (int(x.size) // n,), THREADS, [x, *vectors, y, n, float(eps)], norm_bytes(n))


def rms_norm_rows(kernels: Kernels, x: Array, weight: Array, eps: float, rows: Rows) -> None:
    """`rms_norm` of x (n_rows, n), written to what `rows` has: floats, the converted form, or both. Overlaps."""
    _norm_rows(kernels, "rms_norm_rows", x, [weight], eps, rows)


def layer_norm_rows(kernels: Kernels, x: Array, weight: Array, bias: Array, eps: float, rows: Rows) -> None:
    """`layer_norm` of x (n_rows, n), written to what `rows` has: floats, the converted form, or both. Overlaps."""
    _norm_rows(kernels, "layer_norm_rows", x, [weight, bias], eps, rows)


def _norm_rows(kernels: Kernels, kernel: str, x: Array, vectors: list[Array], eps: float, rows: Rows) -> None:
    n = _width(kernel, x, vectors)
    check_shape(kernel, "the floats' array", rows.floats, x.shape)
    to = rows.converted
    if to is not None:
        to.check(kernel, len(x), n)
    arrays = [rows.floats, *((to.data, to.scale, to.sums) if to else (None, None, None))]
    arguments = [x, *vectors, *arrays, n, int(to is not None and to.halves), float(eps)]
    kernels.launch("norm", kernel, (len(x),), THREADS, arguments, 4 * n + norm_bytes(n), overlap=True)


def row_squares(kernels: Kernels, x: Array, squares: Array) -> None:
    """The sums of squares of the groups of rows x (n_rows, n); squares: see `Rows`. Overlaps."""
    n = _width("row_squares", x, [])
    check_shape("row_squares", "the squares' array", squares, (len(x), n // GROUP))
    kernels.launch("norm", "row_squares", (len(x), -(-n // THREADS)), THREADS, [x, squares, n], overlap=True)


def norm_bytes(n: int) -> int:
    """The bytes of shared memory for the moments of a row of n: sums of its groups, aligned for what is behind them."""
    return 8 * (-(-n // GROUP) + 1)


def _width(kernel: str, x: Array, vectors: list[Array]) -> int:
    n = int(x.shape[-1])
    if any(v.shape != (n,) for v in vectors):
        raise KernelError(f"{kernel}: rows of {n}, but weights of {[v.shape for v in vectors]}")
    return n
