"""Rotary position embedding: bindings of kernels_cu/rope.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError

Angles = tuple[Array, Array]


def rope(kernels: Kernels, x: Array, angles: Angles, y: Array, *, neox: bool) -> None:
    """y = x rotated. x, y: (n_tokens, n_head, head_dim) float32; angles: cos, sin (n_tokens, 1, n_rot / 2) float32.

    neox: True rotates pairs of elements i and i + n_rot / 2, False pairs 2i and 2i + 1.
    """
    n_tokens, n_head, head_dim = x.shape
    half = angles[0].shape[-1]
    kernel = "rope_neox_f32" if neox else "rope_norm_f32"
    if any(a.shape != (n_tokens, 1, half) for a in angles) or 2 * half > head_dim:
        raise KernelError(f"{kernel}: heads {x.shape}, angles {[a.shape for a in angles]}")
    check_shape(kernel, "the output", y, x.shape)
    kernels.launch("rope", kernel, (n_tokens, n_head), 64, [x, *angles, y, half, head_dim])
