"""Attention over the paged KV cache: bindings of kernels_cu/attention.cu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.memory import Arena
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
from refengine.errors import KernelError

BLOCK_ROWS, TILE, SPLIT = 16, 64, 512  # rows per block of threads; positions per tile and per split
HEAD_DIMS = (32, 64, 96, 128)  # the head widths of the compiled kernels; narrower heads are padded
BUSY = 264  # blocks of threads that keep a large GPU busy; with fewer blocks, positions are divided into splits
PARTIAL_BYTES = 64 << 20  # the most work space for splits that have their own blocks of threads


@dataclass(frozen=True)
class PagedRows:
    """K or V of a layer. values: (n_blocks, n_head_kv, block_size, head_dim) float16, each row times 2^-e.

    exponents: (n_blocks, n_head_kv, block_size) uint8, e + 127. arena: the arena that has both, kept alive.
    The positions of a head in a block are adjacent, because a block of threads reads one KV head.
    """

    values: Array
    exponents: Array
    arena: Arena | None = None

    @staticmethod
    def of(
        make: Callable[[tuple[int, ...], Any], Array], shape: tuple[int, ...], arena: Arena | None = None
    ) -> PagedRows:
        """Rows of arrays that `make` makes, given their shape and type.

        shape: (n_blocks, block_size, n_head_kv, head_dim), as caches have it (`Ops.kv_arrays`).
        """
        n_blocks, block_size, n_head_kv, head_dim = shape
        rows = (n_blocks, n_head_kv, block_size)
        return PagedRows(make((*rows, head_dim), np.float16), make(rows, np.uint8), arena)

    @cached_property
    def struct(self) -> Struct:
        """The struct `CachedRows` or `NewRows` of arguments.cuh."""
        return Struct(self.values, self.exponents)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.exponents.nbytes)


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
    """cos, sin: (n_positions, n_rot / 2) float32, or None without RoPE; neox as in `rope.rope`."""

    cos: Array | None
    sin: Array | None
    neox: bool

    @property
    def half(self) -> int:
        return 0 if self.cos is None else int(self.cos.shape[-1])


@dataclass(frozen=True)
class BatchLayout:
    """The rows of a batch, on the device and for the launch.

    tables: the block tables one after another, int32. spans: (n_spans, 4) int32: first row, number of rows, positions,
    begin of its table. tiles: (n_tiles, 2) int32: span, first row in it (of a KV head). longest: the positions of the
    longest sequence. furthest: the smallest number of positions before the first row of a sequence.
    """

    tables: Array
    spans: Array
    tiles: Array
    longest: int
    furthest: int


def head_width(head_dim: int) -> int:
    """The head width of the kernel that is used for head_dim."""
    return next(d for d in HEAD_DIMS if d >= head_dim)


def shared_bytes(width: int) -> int:
    """The bytes of the struct `Shared` in kernels_cu/attention.cu."""
    groups, rows, warps = width // 32, BLOCK_ROWS, SPLIT // TILE
    halves = rows * (groups | 1) * 32 * 2
    return halves + 4 * (rows + 4 * warps * rows + 4 * rows + warps * groups * 16 * 32)


def check_cache(n_head: int, head_dim: int, k_cache: PagedRows) -> None:
    """Raises KernelError if the kernels do not support these heads with this cache."""
    _, n_head_kv, block_size, cached_dim = k_cache.values.shape
    if head_dim != cached_dim or n_head % n_head_kv or head_dim % 8 or head_dim > HEAD_DIMS[-1]:
        raise KernelError(
            f"attention: {n_head} heads of {head_dim} over a cache of {n_head_kv} of {cached_dim}; kernels support "
            f"multiples of 8 up to {HEAD_DIMS[-1]}"
        )
    if block_size % TILE:
        raise KernelError(f"attention: blocks of {block_size} positions are not a multiple of {TILE}")


def check_projections(
    kernel: str,
    qkv: Projections,
    heads: tuple[int, int, int],
    positions: Array,
    tables: Array,
    caches: tuple[PagedRows, PagedRows],
    norms: tuple[Array | None, Array | None],
) -> None:
    """Raises KernelError unless all fits n rows with n_head query heads of head_dim, which are `heads`."""
    n, n_head, head_dim = heads
    k_cache, v_cache = caches
    check_cache(n_head, head_dim, k_cache)
    n_head_kv = k_cache.values.shape[1]
    check_shape(kernel, "the V cache", v_cache.values, k_cache.values.shape)
    check_shape(kernel, "the positions' array", positions, (n,))
    check_shape(kernel, "the tables' array", tables, (n, tables.shape[-1]))
    for weight in norms:
        check_shape(kernel, "the weight of a norm", weight, (head_dim,))
    for part, stride, count in zip(qkv.parts, qkv.strides, (n_head, n_head_kv, n_head_kv), strict=True):
        if part.size < (n - 1) * stride + count * head_dim:
            raise KernelError(
                f"{kernel}: {n} rows of {count} heads of {head_dim}, {stride} floats apart, do not fit {part.size}"
            )


def split_bytes(n_tokens: int, n_head: int, head_dim: int, n_splits: int) -> int:
    """The bytes of the work space of `attention` if splits have their own blocks; at most PARTIAL_BYTES are used."""
    return 4 * n_tokens * n_head * n_splits * (head_dim + 2)


def splits_of(
    batch: BatchLayout, q_shape: tuple[int, int, int], n_head_kv: int, window: int, separate: bool | None
) -> tuple[int, int, bool]:
    """The first split that some row sees, the number of splits, and whether each has its own block of threads.

    q_shape: (n_tokens, n_head, head_dim). separate: requests or forbids own blocks; None decides by size.
    """
    first = max(batch.furthest - window + 1, 0) // SPLIT if window else 0
    n_splits = -(-batch.longest // SPLIT) - first
    if separate is None:
        fits = split_bytes(*q_shape, n_splits) <= PARTIAL_BYTES
        separate = n_splits > 1 and len(batch.tiles) * n_head_kv < BUSY and fits
    return first, n_splits, separate


def attention(
    kernels: Kernels,
    q: Array,
    k_cache: PagedRows,
    v_cache: PagedRows,
    batch: BatchLayout,
    y: Array,
    *,
    scale: float,
    window: int,
    sinks: Array | None,
    splits: tuple[int, int, bool],
    partial: Array | None,
) -> None:
    """Causal attention of all rows of a batch.

    q: (n_tokens, n_head, head_dim), y: (n_tokens, n_head · head_dim) float32. splits: the result of `splits_of`.
    partial: if splits have their own blocks, work space (n_tokens, n_head, n_splits, head_dim + 2) float32.
    """
    n_tokens, n_head, head_dim = q.shape
    _, n_head_kv, block_size, _ = k_cache.values.shape
    first, n_splits, separate = splits
    width = head_width(head_dim)
    check_shape("attention", "the output", y, (n_tokens, n_head * head_dim))
    check_shape("attention", "the sinks' array", sinks, (n_head,))
    if separate:
        check_shape("attention", "the space for splits", partial, (n_tokens, n_head, n_splits, head_dim + 2))
    sizes = [n_head, n_head_kv, head_dim, block_size, window, float(scale), first, n_splits]
    out = partial if separate else y
    arguments = [q, k_cache.struct, v_cache.struct, batch.tables, sinks, batch.spans, batch.tiles, out, *sizes]
    grid = (len(batch.tiles), n_head_kv, n_splits if separate else 1)
    kernel = f"attention_{'splits' if separate else 'rows'}_{width}"
    kernels.launch("attention", kernel, grid, 256, arguments, shared_bytes(width))
    if separate:
        arguments = [partial, sinks, y, n_head, head_dim, n_splits]
        kernels.launch("attention", "attention_merge", (n_tokens, n_head), head_dim, arguments)


def kv_append(kernels: Kernels, rows: Array, slots: Array, cache: PagedRows) -> None:
    """Write rows (n_tokens, n_head_kv, head_dim) float32 to the cache at slots (n_tokens,) int64, see `Batch`."""
    n_tokens, n_head_kv, head_dim = rows.shape
    _, cached_heads, block_size, cached_dim = cache.values.shape
    check_shape("kv_append", "the new rows' array", rows, (len(slots), cached_heads, cached_dim))
    arguments = [rows, slots, cache.struct, head_dim, block_size]
    kernels.launch("attention", "kv_append_f16", (n_tokens, n_head_kv), 32, arguments)
