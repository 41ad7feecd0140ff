"""Attention of one new token for each sequence: bindings of kernels_cu/attention_step.cu."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from refengine.array import Array
from refengine.cuda.kernels.attention import (
    BUSY,
    SPLIT,
    TILE,
    PagedRows,
    Projections,
    Rotation,
    check_projections,
    head_width,
)
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Numbers
from refengine.errors import KernelError

STEP_ROWS, QUAD = 8, 256  # rows per block of threads, and positions that it computes together
MOST_QUADS = 4  # a row that sees more quads of tiles is divided into splits, see `step_division`


class Has(IntFlag):
    """What a launch has: the numbers of attention_step.cu."""

    Q_NORM = 1
    K_NORM = 2
    ROTATION = 4
    SINKS = 8
    FACTOR = 16


@dataclass(frozen=True)
class Plan(Numbers):
    """A launch, with the fields of the C struct of this name, which explains them (attention_step.cu)."""

    width: int
    has: int
    q_stride: int
    k_stride: int
    v_stride: int
    group: int
    n_head_kv: int
    head_dim: int
    half: int
    neox: int
    block_size: int
    window: int


def step_shared_bytes(width: int) -> int:
    """The bytes of the struct `StepShared` in kernels_cu/attention_step.cu."""
    rows, warps, tiles = STEP_ROWS, SPLIT // TILE, QUAD // TILE
    halves = 2 * (QUAD + rows + 2) * width
    of_tile = 2 * 32 * 16 + 16 * rows + 4 * rows * (TILE + 4) + 2 * TILE
    return -(-(halves + tiles * of_tile + 4 * (warps * width + 3 * rows) + 2 + 2 + 4 * 4 + 4 + 8) // 16) * 16


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
    has = Has.Q_NORM * (norms[0] is not None) | Has.K_NORM * (norms[1] is not None) | Has.SINKS * (sinks is not None)
    has |= Has.ROTATION * (rotation.cos is not None) | Has.FACTOR * (q_factor != 1.0)
    sizes = (group, n_head_kv, head_dim, rotation.half, int(rotation.neox), block_size, window)
    plan = Plan(width // 32, int(has), *qkv.strides, *sizes)
    arrays = (qkv.struct, *norms, rotation.cos, rotation.sin, k_cache.struct, v_cache.struct, tables, positions)
    numbers = (tables.shape[1], division.n_entries, division.most_quads, float(eps), float(q_factor), float(scale))
    arguments = [*arrays, sinks, partial, arrived, y, plan.struct, *numbers]
    grid, shared = (tiles, n_head_kv, division.at_once), step_shared_bytes(width)
    constants = plan.constants if kernels.for_plans else ()
    kernels.launch(kernel, f"{kernel}_{width}", grid, 256, arguments, shared, overlap=True, constants=constants)
