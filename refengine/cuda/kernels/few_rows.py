"""Products with quantised and F16 weights for up to 8 rows, as in a decode step: bindings of kernels_cu/few_rows.cu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from math import prod

from gguf import GGMLQuantizationType

from refengine.array import Array
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import GROUP, Converted, Rows, n_segments
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, segment_bytes, tile_bytes
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError
from refengine.ops.integers import SEGMENT

FEW_ROWS = 8  # rows per block of threads
STAGES = 2  # of a warp's ring, each with the weights of a segment
ENTRY_BYTES = 16  # of a tile of one matrix
MOST_MATRICES = 3
MOST_WARPS, LEAST_WARPS = 8, 4  # the registers of 8 warps fit half a multiprocessor
PREPARING_WARPS = 8  # of a block that converts its rows
BLOCKS_EACH = 2  # of a multiprocessor; the kernel's launch bounds have the same
BUSY = 10  # items for each multiprocessor from which so many blocks are faster than one
HALF_SHARED = 113 << 10  # bytes for one block, so that a block of the next kernel fits on the multiprocessor as well
LEAST_SHARED = 99 << 10  # bytes that a block may have on every supported device; sm_86 and sm_89 have no more


class Activation(IntEnum):
    """What becomes of the products: the numbers of few_rows.cu."""

    NONE = 0
    SWIGLU = 1
    SWIGLU_CLAMPED = 2
    GELU = 3

    @property
    def gated(self) -> bool:
        """Whether it takes the products of two matrices, gate and up."""
        return self in (Activation.SWIGLU, Activation.SWIGLU_CLAMPED)


@dataclass(frozen=True)
class FewRowsLaunch:
    """Blocks for each group of rows, warps per block, bytes of shared memory, and what the kernel is told of it: shift,
    chunk, stage_bytes, early, tiles_each, entry_steps and segment_steps of few_rows.cu."""

    blocks: int
    warps: int
    shared_bytes: int
    arguments: tuple[int, ...]

    @property
    def threads(self) -> int:
        return 32 * self.warps


def multiply(
    kernels: Kernels,
    x: Rows,
    matrices: Sequence[PackedMatrix],
    biases: Sequence[Array | None],
    y: Array,
    *,
    activation: Activation = Activation.NONE,
    residual: Array | None = None,
    groups: Groups | None = None,
    squares: Array | None = None,
) -> None:
    """y = activation(x wᵀ + bias) + residual for one matrix; with groups, each row uses the matrix of its expert.

    Up to three matrices (·, n_in) without activation: y has their products one after another. Gate and up, for a gated
    activation: y = activation(x gateᵀ + bias, x upᵀ + bias). Overlaps with the previous kernel.

    w: (n_out, n_in), or (n_expert, n_out, n_in) with groups. y, residual: (n_rows, n_out) float32; with groups, y has a
    row for each pair. biases: (n_out,), or (n_expert, n_out), each or None. squares: is filled with those of y, if
    n_out is a multiple of 16; see `Rows`. Raises KernelError for what does not fit.
    """
    first = matrices[0]
    n_in = first.shape[-1]
    n_matrices = len(matrices)
    n_out = first.shape[-2] if activation.gated else sum(w.shape[-2] for w in matrices)
    if not fits(matrices, groups.size if groups else x.n, activation, grouped=groups is not None):
        found = ", ".join(f"{w.type.name} {w.shape}" for w in matrices)
        rows = f"{x.n} rows" if groups is None else f"groups of {groups.size} rows"
        raise KernelError(
            f"{first.name}: a product of few rows with {activation.name} does not support {rows}, {found}"
        )
    x.check_converted(first.name, n_in, halves=reads_halves(first), few=True)
    check_shape(first.name, "the output", y, (len(groups.y_rows) if groups else x.n, n_out))
    check_shape(first.name, "the residual", residual, y.shape)
    check_shape(first.name, "the squares' array", squares, (len(y), n_out // GROUP))
    if squares is not None and n_out % GROUP:
        raise KernelError(f"{first.name}: {n_out} outputs are not a multiple of {GROUP}, so they have no squares")
    for w, bias in zip(matrices, biases, strict=True):
        check_shape(w.name, "the bias", bias, w.shape[:-1])
    n_groups = len(groups.group) if groups else 1
    launch = few_rows_launch(kernels, matrices, n_out, x, groups.most if groups else x.n, n_groups, activation.gated)
    missing = MOST_MATRICES - n_matrices
    below = 1 if activation.gated else n_matrices  # matrices one below another; others begin after all tiles
    begins = [sum(w.shape[-2] for w in matrices[:i]) // TILE_ROWS for i in range(1, below)]
    begins += [-(-n_out // TILE_ROWS)] * (MOST_MATRICES - below)
    arguments = [
        *(w.data for w in matrices),
        *[None] * missing,
        x.struct,
        groups.struct if groups else NO_GROUPS,
        *biases,
        *[None] * missing,
        residual,
        y,
        squares,
        *(kind_of(w.type) for w in matrices),
        *[0] * missing,
        *(tile_bytes(w.type, n_in) for w in matrices),
        *[0] * missing,
        *begins,
        int(activation),
        *(n_out, n_in, len(y) if groups else x.n, *launch.arguments, x.eps),
    ]
    grid, shared = (launch.blocks, n_groups), launch.shared_bytes
    kernel = "few_rows" if launch.arguments[0] or x.converted else "one_row"
    kernels.launch("few_rows", kernel, grid, launch.threads, arguments, shared, overlap=True, what=first.name)


def fits(
    matrices: Sequence[PackedMatrix], n_rows: int, activation: Activation = Activation.NONE, *, grouped: bool = False
) -> bool:
    """Whether `multiply` supports these matrices for blocks of up to n_rows rows (with groups: their size)."""
    first = matrices[0]
    if n_rows > FEW_ROWS or any(w.is_float or w.shape[-1] != first.shape[-1] for w in matrices):
        return False
    if any(reads_halves(w) != reads_halves(first) for w in matrices):
        return False
    if activation.gated:
        return len(matrices) == 2 and matrices[1].shape == first.shape
    if len(matrices) > 1 and (grouped or activation is not Activation.NONE):
        return False
    return len(matrices) <= MOST_MATRICES and not any(w.shape[-2] % TILE_ROWS for w in matrices[:-1])


def reads_halves(w: PackedMatrix) -> bool:
    """Whether a product with this matrix reads rows of halves, rather than of integers."""
    return w.type == GGMLQuantizationType.F16


def few_rows_launch(
    kernels: Kernels,
    matrices: Sequence[PackedMatrix],
    n_out: int,
    x: Rows,
    n_rows: int,
    n_groups: int = 1,
    gated: bool = False,
) -> FewRowsLaunch:
    """The launch for a product of rows x with matrices: n_out outputs in all, or of each of two if `gated`.

    n_rows: the most rows in a block of threads. n_groups: the groups of rows, or of rows of one expert. Raises
    KernelError if the rows need more shared memory than a block may have.
    """
    first = matrices[0]
    device = (kernels.n_multiprocessors, kernels.shared_limit)
    types = tuple(w.type for w in matrices)
    launch = _launch(types, first.shape[-1], n_out, n_rows, n_groups, gated, *device, x.converted is None)
    if launch.shared_bytes > kernels.shared_limit:
        raise KernelError(
            f"{first.name}: {n_rows} rows of {first.shape[-1]} need {launch.shared_bytes} bytes of shared memory, "
            f"the device has {kernels.shared_limit}"
        )
    return launch


def can_prepare(matrices: Sequence[PackedMatrix], n_rows: int) -> bool:
    """Whether a block of threads has room to convert its rows, up to n_rows, for a product with these matrices, even if
    it is gated. The same on all devices, because it decides which buffers a step has."""
    shift = max(0, n_rows - 1).bit_length()
    stage = stage_bytes(tuple(w.type for w in matrices))
    return shared_bytes(stage, matrices[0].shape[-1], 1, 1, 1, shift, True, prepares=True) <= LEAST_SHARED


@lru_cache(maxsize=4096)
def _launch(
    types: tuple[GGMLQuantizationType, ...],
    n_in: int,
    n_out: int,
    n_rows: int,
    n_groups: int,
    gated: bool,
    n_multiprocessors: int,
    shared_limit: int,
    prepares: bool,
) -> FewRowsLaunch:
    shift = max(0, n_rows - 1).bit_length()
    n_side_by_side = 2 if gated else 1
    items_each = n_side_by_side * -(-n_in // SEGMENT)
    n_tiles = -(-n_out // TILE_ROWS)
    # Small matrices: a block on each multiprocessor, beside one of the next kernel. Larger ones: two, to use all of it.
    large = n_tiles * items_each * n_groups > BUSY * n_multiprocessors
    wanted = n_multiprocessors * (BLOCKS_EACH if large else 1)
    blocks = max(1, min(n_tiles, -(-wanted // n_groups)))
    tiles_each = -(-n_tiles // blocks)  # at most
    chunk = max(1, min(tiles_each, (8 << 10) // (n_side_by_side * sums_bytes(n_in, shift))))
    warps = min(MOST_WARPS, max(tiles_each * items_each, PREPARING_WARPS if prepares else LEAST_WARPS))
    stage = stage_bytes(types)

    def shared(warps: int) -> int:
        return shared_bytes(stage, n_in, warps, chunk, tiles_each, shift, gated, prepares=prepares)

    while warps > LEAST_WARPS and shared(warps) > min(HALF_SHARED, shared_limit):
        warps -= 1
    while warps > 1 and shared(warps) > shared_limit:
        warps -= 1
    # The blocks of large products begin late, and the rows, which are needed first, would wait for many weights.
    early = 1 if large and prepares else STAGES
    steps = divmod(warps, n_segments(n_in))
    return FewRowsLaunch(blocks, warps, shared(warps), (shift, chunk, stage, early, tiles_each, *steps))


def kind_of(kind: GGMLQuantizationType) -> int:
    """ggml's number of a type, and, 8 bits higher, the bytes of a segment of a tile."""
    return int(kind) | segment_bytes(kind) << 8


def stage_bytes(types: tuple[GGMLQuantizationType, ...]) -> int:
    """The bytes of an item's weights, of whichever of these types has most."""
    return max(segment_bytes(kind) for kind in types)


def sums_bytes(n_in: int, shift: int) -> int:
    """The bytes of the segments' sums of a tile: of each output and row some float4, no multiple of four of them."""
    fours = -(-n_segments(n_in) // 4)
    return 16 * TILE_ROWS * (fours + (fours % 4 == 0)) << shift


def shared_bytes(
    stage: int, n_in: int, warps: int, chunk: int, tiles: int, shift: int, gated: bool = False, *, prepares: bool
) -> int:
    """The bytes of shared memory of a block. stage: `stage_bytes`. tiles: the most of a block. prepares: whether it
    converts its rows."""
    data, sums, scale = (prod(shape[1:]) for shape in Converted.shapes(1, n_in))
    of_items = 2 * chunk * (2 if gated else 1) * sums_bytes(n_in, shift)
    rows = data + 64 + 4 * (sums + scale) << shift if prepares else 0
    return warps * STAGES * stage + ENTRY_BYTES * tiles * (2 if gated else 1) + of_items + rows
