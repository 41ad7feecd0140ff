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
STEP_ROWS, QUAD = 8, 256  # rows per block of threads in `attention_step`, and positions that it computes together
MOST_QUADS = 4  # a row of `attention_step` that sees more quads of tiles is divided into splits, see `step_division`
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


def step_shared_bytes(width: int) -> int:
    """The bytes of the struct `StepShared` in kernels_cu/attention.cu."""
    rows, warps, tiles = STEP_ROWS, SPLIT // TILE, QUAD // TILE
    halves = 2 * (QUAD + rows + 2) * width
    of_tile = 2 * 32 * 16 + 16 * rows + 4 * rows * (TILE + 4) + 2 * TILE
    return -(-(halves + tiles * of_tile + 4 * (warps * width + 3 * rows) + 2 + 2 + 4 * 4 + 4 + 8) // 16) * 16


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


def step_blocks(group: int) -> int:
    """How many blocks of threads `attention_step` has for the query heads of a KV head."""
    return -(-group // STEP_ROWS)


@dataclass(frozen=True)
class StepDivision:
    """How `attention_step` divides the positions that a row sees among blocks of threads.

    at_once: the number of blocks for the same rows. most_quads: a row that sees several splits, but not more quads of
    tiles, is divided into quads, any other into splits. n_entries: the most tiles or splits of a row that are written
    to the work space.
    """

    at_once: int
    most_quads: int
    n_entries: int


def step_division(n: int, n_head: int, k_cache: PagedRows, tables: Array, window: int) -> StepDivision:
    """The division for n rows. tables: (n or more, n_blocks), the block tables; only the shape is used.

    All blocks fit on a large GPU together. Quads spread a row over twice as many blocks as splits, but each adds four
    entries to write and to fold, which one warp does for a row. So they are used while a block takes one of them, and
    up to MOST_QUADS. A row that sees one split needs no other block, and no work space.
    """

    def seen(unit: int) -> int:
        in_window = -(-(window - 1) // unit) + 1 if window else n_positions
        return min(-(-n_positions // unit), in_window)

    _, n_head_kv, block_size, _ = k_cache.values.shape
    n_positions = tables.shape[1] * block_size
    n_blocks = n * step_blocks(n_head // n_head_kv) * n_head_kv
    share = max(1, BUSY // n_blocks)
    most_quads = min(seen(QUAD), MOST_QUADS, share) if share > 1 and seen(SPLIT) > 1 else 0
    return StepDivision(min(share, max(most_quads, seen(SPLIT))), most_quads, max(4 * most_quads, seen(SPLIT)))


def counters_of(n: int, n_head: int) -> int:
    """How many counters `attention_step` may need for n rows: one for each row and 8 query heads of a KV head."""
    return n * n_head


def attention_step(
    kernels: Kernels,
    qkv: Projections,
    rotation: Rotation,
    positions: Array,
    tables: Array,
    k_cache: PagedRows,
    v_cache: PagedRows,
    partial: Array,
    arrived: Array,
    y: Array,
    *,
    scale: float,
    window: int,
    sinks: Array | None,
    norms: tuple[Array | None, Array | None] = (None, None),
    eps: float = 0.0,
    q_factor: float = 1.0,
) -> None:
    """Attention of one new token for each of n sequences: RMS norm of the heads (with weights `norms`), RoPE, Q times
    q_factor; K and V are written to the cache. Overlaps: everything but Q, K and V is read before the previous kernel
    has ended, so it must have been written before a kernel began that did not overlap.

    positions: (n,) int32, below zero for rows without a sequence. tables: (n, n_blocks) int32. partial: work space
    (n, n_head, n_entries, head_dim + 2) float32, see `step_division`. arrived: `counters_of(n, n_head)` int32 or more,
    zeros before and after. y: (n, n_head · head_dim) float32.
    """
    n, n_head = partial.shape[:2]
    _, n_head_kv, block_size, head_dim = k_cache.values.shape
    kernel = "attention_step"
    check_projections(kernel, qkv, (n, n_head, y.shape[-1] // n_head), positions, tables, (k_cache, v_cache), norms)
    check_shape(kernel, "the output", y, (n, n_head * head_dim))
    check_shape(kernel, "the sinks' array", sinks, (n_head,))
    division = step_division(n, n_head, k_cache, tables, window)
    check_shape(kernel, "the work space", partial, (n, n_head, division.n_entries, head_dim + 2))
    group = n_head // n_head_kv
    tiles = step_blocks(group) * n
    if arrived.size < tiles * n_head_kv:
        raise KernelError(f"{kernel}: {arrived.size} counters, {tiles * n_head_kv} are needed")
    width = head_width(head_dim)
    arrays = [qkv.struct, *norms, rotation.cos, rotation.sin, k_cache.struct, v_cache.struct, tables, positions]
    sizes = [group, n_head_kv, head_dim, rotation.half, rotation.neox, block_size, window, tables.shape[1]]
    numbers = [*qkv.strides, *sizes, division.n_entries, division.most_quads, float(eps), float(q_factor), float(scale)]
    arguments = [*arrays, sinks, partial, arrived, y, *numbers]
    grid, shared = (tiles, n_head_kv, division.at_once), step_shared_bytes(width)
    kernels.launch("attention", f"{kernel}_{width}", grid, 256, arguments, shared, overlap=True)


def kv_append(kernels: Kernels, rows: Array, slots: Array, cache: PagedRows) -> None:
    """Write rows (n_tokens, n_head_kv, head_dim) float32 to the cache at slots (n_tokens,) int64, see `Batch`."""
    n_tokens, n_head_kv, head_dim = rows.shape
    _, cached_heads, block_size, cached_dim = cache.values.shape
    check_shape("kv_append", "the new rows' array", rows, (len(slots), cached_heads, cached_dim))
    arguments = [rows, slots, cache.struct, head_dim, block_size]
    kernels.launch("attention", "kv_append_f16", (n_tokens, n_head_kv), 32, arguments)
