"""Element-wise operations: bindings of kernels_cu/activation.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError

THREADS = 256


def swiglu(kernels: Kernels, gate: Array, up: Array, y: Array, *, overlap: bool = False) -> None:
    """y = silu(gate) · up. All have the same shape, float32."""
    _launch(kernels, "swiglu_f32", gate, up, y, overlap=overlap)


def swiglu_clamped(kernels: Kernels, gate: Array, up: Array, y: Array, *, overlap: bool = False) -> None:
    """y = gpt-oss' clamped SwiGLU (`ops.activation.swiglu_clamped`). All have the same shape, float32."""
    _launch(kernels, "swiglu_clamped_f32", gate, up, y, overlap=overlap)


def gelu(kernels: Kernels, x: Array, y: Array, *, overlap: bool = False) -> None:
    """y = tanh GELU of x. Both have the same shape, float32."""
    _launch(kernels, "gelu_f32", x, y, overlap=overlap)


def add(kernels: Kernels, a: Array, b: Array, y: Array, *, overlap: bool = False) -> None:
    """y = a + b. All have the same shape, float32."""
    _launch(kernels, "add_f32", a, b, y, overlap=overlap)


def scale(kernels: Kernels, x: Array, y: Array, *, factor: float, overlap: bool = False) -> None:
    """y = x · factor, which is rounded to float32 before. Both of one shape, float32."""
    _launch(kernels, "scale_f32", x, y, numbers=(factor,), overlap=overlap)


def _launch(kernels: Kernels, kernel: str, *arrays: Array, numbers: tuple[float, ...] = (), overlap: bool) -> None:
    n = int(arrays[-1].size)
    if any(a.size != n for a in arrays):
        raise KernelError(f"{kernel}: shapes {[a.shape for a in arrays]}, expected all to have the same size")
    kernels.launch("activation", kernel, (-(-n // THREADS),), THREADS, [*arrays, *numbers, n], overlap=overlap)
