"""Rotary position embedding: bindings of kernels_cu/rope.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.attention import PagedRows, Projections, Rotation, check_projections
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


def rope_append(
    kernels: Kernels,
    qkv: Projections,
    rotation: Rotation,
    positions: Array,
    tables: Array,
    q: Array,
    k_cache: PagedRows,
    v_cache: PagedRows,
    *,
    norms: tuple[Array | None, Array | None] = (None, None),
    eps: float = 0.0,
    q_factor: float = 1.0,
) -> None:
    """RMS norm of the heads (with weights `norms`), RoPE, Q times q_factor; writes K and V to the cache. Overlaps.

    positions: (n,) int32, below zero for rows without a sequence; tables: (n, n_blocks) int32; q: the output,
    (n, n_head, head_dim) float32.
    """
    n, n_head, head_dim = q.shape
    _, n_head_kv, block_size, _ = k_cache.values.shape
    check_projections("rope_append", qkv, q.shape, positions, tables, (k_cache, v_cache), norms)
    sizes = [n_head, n_head_kv, head_dim, rotation.half, rotation.neox, block_size, tables.shape[1]]
    arrays = [qkv.struct, *norms, rotation.cos, rotation.sin, positions, tables, q, k_cache.struct, v_cache.struct]
    arguments = [*arrays, *qkv.strides, *sizes, float(eps), float(q_factor)]
    kernels.launch("rope", "rope_append", (n, n_head + 2 * n_head_kv), 32, arguments, overlap=True)
