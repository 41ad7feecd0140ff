"""Products with quantised and F16 weights: bindings of kernels_cu/matmul.cu. `linear` also accepts F32 and BF16."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import hypot, prod
from typing import Any

from gguf import GGMLQuantizationType

from refengine.array import Array
from refengine.cuda.kernels import few_rows, matmul_f32
from refengine.cuda.kernels.few_rows import FEW_ROWS
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import Converted, Rows, n_segments
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, segment_bytes
from refengine.cuda.runtime.launch import Kernels

MANY_ROWS = 64  # rows of a group of rows64_*
WARP_ROWS = 32  # rows of a warp
MOST_WARPS = 16  # of a multiprocessor: their registers fill it
MOST_STAGES = 3  # of segments that are on the way or being multiplied
OF_SYSTEM = 1 << 10  # bytes of shared memory that the system takes for each block
F16_WARPS = 4  # of a block of rows64_f16, each with a tile


@dataclass(frozen=True)
class ManyRowsLaunch:
    """How rows64_* is launched. A block has row_warps · tiles · depth warps: each multiplies 32 rows with a tile, and
    `depth` of them divide its segments among themselves. stages: of shared memory, each with `depth` segments.
    capacity: the most rows of a block that exist, a multiple of 16.
    """

    kind: GGMLQuantizationType
    row_warps: int
    tiles: int
    depth: int
    stages: int
    capacity: int

    @property
    def kernel(self) -> str:
        parts = "parts_" if self.depth > 1 else ""
        return f"rows64_{parts}{self.kind.name.lower()}"

    @property
    def warps(self) -> int:
        return self.row_warps * self.tiles * self.depth

    @property
    def most_warps(self) -> int:
        """The most warps of a block and of a multiprocessor, of which each takes the same registers."""
        return 12 if self.kind == GGMLQuantizationType.Q6_K and self.depth > 1 else MOST_WARPS

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """The most rows of a block."""
        return WARP_ROWS * self.row_warps

    @property
    def shared_bytes(self) -> int:
        """The rows' numbers, stages with segments of rows and tiles, and, of several parts, their sums, twice."""
        sums = 2 * self.warps * WARP_ROWS * TILE_ROWS * 4 if self.depth > 1 else 0
        return 4 * self.capacity + self.stages * self.depth * self.segment_bytes(self.capacity) + sums

    def segment_bytes(self, n_rows: int) -> int:
        """The bytes of a segment of n_rows rows and all tiles."""
        data, sums, scale = (prod(shape) for shape in Converted.shapes(n_rows, 1))
        return data + 4 * sums + 4 * scale + self.tiles * segment_bytes(self.kind)

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """capacity, row_shift, depth_shift and n_stages of the kernel."""
        return self.capacity, self.row_warps.bit_length() - 1, self.depth.bit_length() - 1, self.stages

    def grid(self, n_tiles: int, n_rows: int, n_groups: int | None) -> tuple[int, int, int]:
        """The grid for n_rows rows, or for n_groups groups."""
        of_rows = -(-(n_rows if n_groups is None else MANY_ROWS) // self.rows)
        return of_rows, -(-n_tiles // self.tiles), n_groups or 1


def linear(
    kernels: Kernels,
    x: Rows,
    w: PackedMatrix,
    y: Array,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    groups: Groups | None = None,
    overlap: bool = False,
    squares: Array | None = None,
) -> None:
    """y = x wᵀ + bias + residual; with groups, each row is multiplied with the matrix of its expert.

    x: in the form that w's type needs. w: (n_out, n_in), or (n_expert, n_out, n_in) with groups. y, residual: (n_rows,
    n_out) float32; bias: (n_out,), or (n_expert, n_out). squares: see `few_rows.multiply`; for few rows of quantised
    matrices only. The sums do not depend on the number of rows or the grouping.
    """
    n_out, n_in = w.shape[-2:]
    if not w.is_float and (groups.size if groups else x.n) <= FEW_ROWS:
        few_rows.multiply(kernels, x, (w,), (bias,), y, residual=residual, groups=groups, squares=squares)
        return
    if w.is_float:
        x.check_floats(w.name, n_in)
    else:
        x.check_converted(w.name, n_in, halves=few_rows.reads_halves(w))
    check_shape(w.name, "the output", y, (len(groups.y_rows) if groups else x.n, n_out))
    check_shape(w.name, "the bias", bias, w.shape[:-1])
    check_shape(w.name, "the residual", residual, y.shape)
    if w.is_float:
        matmul_f32.linear(kernels, x, w, y, bias=bias, residual=residual, groups=groups, overlap=overlap)
        return
    struct = groups.struct if groups else NO_GROUPS
    arguments: list[Any] = [w.data, x.struct, struct, bias, residual, y, n_out, n_in, x.n]
    n_tiles = -(-n_out // TILE_ROWS)
    n_groups = len(groups.group) if groups else None
    if few_rows.reads_halves(w):
        grid = (-(-n_tiles // F16_WARPS), -(-x.n // MANY_ROWS) if n_groups is None else n_groups)
        kernels.launch("matmul", "rows64_f16", grid, 32 * F16_WARPS, arguments, what=w.name)
        return
    device = (kernels.n_multiprocessors, kernels.shared_limit)
    launch = many_rows_launch(w.type, n_tiles, n_in, len(y) if groups else x.n, n_groups, *device)
    arguments += launch.arguments
    of_groups = launch.grid(n_tiles, x.n, n_groups)
    shared = launch.shared_bytes
    kernels.launch("matmul", launch.kernel, of_groups, launch.threads, arguments, shared, overlap=True, what=w.name)


@lru_cache(maxsize=4096)
def many_rows_launch(
    kind: GGMLQuantizationType,
    n_tiles: int,
    n_in: int,
    n_rows: int,
    n_groups: int | None,
    n_multiprocessors: int,
    shared_limit: int,
) -> ManyRowsLaunch:
    """The launch for n_rows rows, in n_groups groups if there are any, that is estimated to take the least time."""
    best, least = None, 0.0
    for row_warps, depth, tiles in product((1, 2), (1, 2, 4, 8), range(1, MOST_WARPS + 1)):
        capacity = min(WARP_ROWS * row_warps, -(-n_rows // 16) * 16)
        launch = ManyRowsLaunch(kind, row_warps, tiles, depth, 2, capacity)
        if launch.warps > launch.most_warps or launch.shared_bytes > shared_limit or depth > n_segments(n_in):
            continue
        of_all = shared_limit + OF_SYSTEM
        resident = min(launch.most_warps // launch.warps, of_all // (launch.shared_bytes + OF_SYSTEM))
        more = replace(launch, stages=MOST_STAGES)
        launch = more if resident * (more.shared_bytes + OF_SYSTEM) <= of_all else launch
        cycles = _cycles(launch, n_tiles, n_in, n_rows, n_groups, resident, n_multiprocessors)
        if best is None or cycles < least:
            best, least = launch, cycles
    assert best is not None
    return best


def _cycles(
    launch: ManyRowsLaunch,
    n_tiles: int,
    n_in: int,
    n_rows: int,
    n_groups: int | None,
    resident: int,
    n_multiprocessors: int,
) -> float:
    """Roughly the cycles of a launch, of which `resident` blocks fit a multiprocessor at a time.

    A warp alone issues an instruction in about 2.5 cycles; one of four schedulers, with several warps, in one. A
    multiprocessor reads about 16 bytes a cycle from the second-level cache.
    """
    rows = n_rows if n_groups is None else -(-n_rows // n_groups)  # of a group, on average
    rows_each = min(rows, launch.rows)
    blocks = -(-n_tiles // launch.tiles) * -(-rows // launch.rows) * (n_groups or 1)
    warps = launch.tiles * launch.depth * -(-rows_each // WARP_ROWS)  # that have something to do
    groups = 4 if min(rows_each, WARP_ROWS) <= WARP_ROWS // 2 else 8
    steps = -(-n_segments(n_in) // launch.depth)
    of_step = groups * 80 + 170 + (100 if launch.depth > 1 else 0)  # instructions of a warp
    copied = launch.depth * launch.segment_bytes(-(-rows_each // 16) * 16)
    each = -(-blocks // n_multiprocessors)
    cycles = 0.0
    for together, times in ((resident, each // resident), (each % resident, 1 if each % resident else 0)):
        a_step = max(of_step * hypot(2.5, -(-together * warps // 4)), copied * together / 16)
        cycles += times * (steps * a_step + 3000)
    return cycles


def group_size(w: PackedMatrix, n_pairs: int) -> int:
    """How many pairs of one expert a product with w (n_expert, n_out, n_in) computes together."""
    return FEW_ROWS if w.is_float or n_pairs <= FEW_ROWS * w.shape[0] else MANY_ROWS
