"""Rotary position embedding: bindings of kernels_cu/rope.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from refengine.array import Array
from refengine.cuda.kernels.attention import PagedRows, check_cache
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
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


@dataclass(frozen=True)
class Projections:
    """Q, K and V of one new token for each of n rows.

    parts: arrays that begin with Q, K and V of the first row. strides: the distances between rows, in floats.
    """

    parts: tuple[Array, Array, Array]
    strides: tuple[int, int, int]

    @cached_property
    def struct(self) -> Struct:
        """The struct `Projections` of arguments.cuh."""
        return Struct(*self.parts)


@dataclass(frozen=True)
class Rotation:
    """cos, sin: (n_positions, n_rot / 2) float32, or None without RoPE; neox as in `rope`."""

    cos: Array | None
    sin: Array | None
    neox: bool

    @property
    def half(self) -> int:
        return 0 if self.cos is None else int(self.cos.shape[-1])


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
    check_cache(n_head, head_dim, k_cache)
    _, block_size, n_head_kv, _ = k_cache.values.shape
    check_shape("rope_append", "the V cache", v_cache.values, k_cache.values.shape)
    check_shape("rope_append", "the positions' array", positions, (n,))
    check_shape("rope_append", "the tables' array", tables, (n, tables.shape[-1]))
    for weight in norms:
        check_shape("rope_append", "the weight of a norm", weight, (head_dim,))
    for part, stride, heads in zip(qkv.parts, qkv.strides, (n_head, n_head_kv, n_head_kv), strict=True):
        if part.size < (n - 1) * stride + heads * head_dim:
            raise KernelError(
                f"rope_append: {n} rows of {heads} heads of {head_dim}, {stride} floats apart, do not fit {part.size}"
            )
    sizes = [n_head, n_head_kv, head_dim, rotation.half, rotation.neox, block_size, tables.shape[1]]
    arrays = [qkv.struct, *norms, rotation.cos, rotation.sin, positions, tables, q, k_cache.struct, v_cache.struct]
    arguments = [*arrays, *qkv.strides, *sizes, float(eps), float(q_factor)]
    kernels.launch("rope", "rope_append", (n, n_head + 2 * n_head_kv), 32, arguments, overlap=True)
