"""Products with quantised and F16 weights for up to 8 rows, as in a decode step: one_row.cu and few_rows.cu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

from gguf import GGMLQuantizationType

from refengine.array import Array
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import GROUP, Converted, Rows, n_segments
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, segment_bytes, tile_bytes
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Constants, Numbers
from refengine.errors import KernelError

FEW_ROWS = 8  # rows per block of threads
STAGES = 2  # of a warp's ring, each with the weights of a segment
ENTRY_BYTES = 16  # of a tile of one matrix
MOST_MATRICES = 3
MOST_WARPS, LEAST_WARPS = 8, 4  # the registers of 8 warps fit half a multiprocessor
WARPS_FOR_PLAN = 12  # the same of kernels for one plan with converted rows
PREPARING_WARPS = 8  # of a block that converts its rows
BLOCKS_EACH = 2  # of a multiprocessor; the kernel's launch bounds have the same
BUSY = 10  # items for each multiprocessor from which so many blocks are faster than one
HALF_SHARED = 113 << 10  # bytes for one block, so that a block of the next kernel fits on the multiprocessor as well
LEAST_SHARED = 99 << 10  # bytes that a block may have on every supported device; sm_86 and sm_89 have no more


class Activation(IntEnum):
    """What becomes of the products: the numbers of few_rows.cuh."""

    NONE = 0
    SWIGLU = 1
    SWIGLU_CLAMPED = 2
    GELU = 3

    @property
    def gated(self) -> bool:
        """Whether it takes the products of two matrices, gate and up."""
        return self in (Activation.SWIGLU, Activation.SWIGLU_CLAMPED)


class Has(IntFlag):
    """What a launch has: the numbers of few_rows.cuh."""

    NORM = 1
    BIAS = 2
    RESIDUAL = 4
    SQUARES = 8
    GROUPS = 16
    FORM = 32  # rows in the form that products read
    KNOWN_GROUPS = 64  # which the previous product has read as well


@dataclass(frozen=True)
class Plan(Numbers):
    """A launch, with the fields of the C struct of this name, which explains them (few_rows.cuh)."""

    a_kind: int
    b_kind: int
    c_kind: int
    a_tile: int
    b_tile: int
    c_tile: int
    second: int
    third: int
    activation: int
    has: int
    n_out: int
    n_in: int
    blocks: int
    warps: int
    shift: int
    chunk: int
    stage_bytes: int
    tiles_each: int

    @staticmethod
    def of(
        matrices: Sequence[Matrix],
        n_in: int,
        activation: Activation,
        has: Has,
        *,
        blocks: int,
        warps: int,
        shift: int,
        chunk: int,
    ) -> Plan:
        """The plan for these matrices of n_in columns; `blocks` for each group of rows."""
        n_out = matrices[0].n_out if activation.gated else sum(m.n_out for m in matrices)
        n_tiles, missing = -(-n_out // TILE_ROWS), [0] * (MOST_MATRICES - len(matrices))
        below = 1 if activation.gated else len(matrices)  # matrices one below another; others begin after all tiles
        second, third = (sum(m.n_out for m in matrices[:i]) // TILE_ROWS if i < below else n_tiles for i in (1, 2))
        a_kind, b_kind, c_kind = [m.type | segment_bytes(m.type) << 8 for m in matrices] + missing
        a_tile, b_tile, c_tile = [tile_bytes(m.type, n_in) for m in matrices] + missing
        return Plan(
            a_kind=a_kind,
            b_kind=b_kind,
            c_kind=c_kind,
            a_tile=a_tile,
            b_tile=b_tile,
            c_tile=c_tile,
            second=second,
            third=third,
            activation=int(activation),
            has=int(has),
            n_out=n_out,
            n_in=n_in,
            blocks=blocks,
            warps=warps,
            shift=shift,
            chunk=chunk,
            stage_bytes=max(segment_bytes(m.type) for m in matrices),  # of whichever type has most
            tiles_each=-(-n_tiles // blocks),
        )

    @cached_property
    def constants(self) -> Constants:
        """What makes a kernel for this plan alone: also the types that occur."""
        kinds = {kind & 255 for kind in (self.a_kind, self.b_kind, self.c_kind)} - {0, GGMLQuantizationType.F16}
        types = (("TYPES", ", ".join(map(str, sorted(kinds)))),) if kinds else ()
        return (*types, *super().constants)

    @property
    def shared_bytes(self) -> int:
        """The bytes of shared memory of a block."""
        sides, rows = (2 if self.activation in (Activation.SWIGLU, Activation.SWIGLU_CLAMPED) else 1), 1 << self.shift
        data, sums, scale = (prod(shape[1:]) for shape in Converted.shapes(1, self.n_in))
        of_items = 2 * self.chunk * sides * sums_bytes(self.n_in, self.shift)
        prepared = 0 if self.has & Has.FORM else rows * (data + 64 + 4 * (sums + scale))
        return self.warps * STAGES * self.stage_bytes + ENTRY_BYTES * self.tiles_each * sides + of_items + prepared


class Matrix(NamedTuple):
    """What a plan depends on of a matrix."""

    type: GGMLQuantizationType
    n_out: int


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
    has = Has.BIAS * any(bias is not None for bias in biases)
    has |= Has.RESIDUAL * (residual is not None) | Has.SQUARES * (squares is not None)
    plan = plan_of(kernels, x, matrices, activation=activation, has=Has(has), groups=groups)
    missing = [None] * (MOST_MATRICES - len(matrices))
    given = (x.struct, groups.struct if groups else NO_GROUPS, *biases, *missing, residual, y, squares, plan.struct)
    kernel = "few_rows" if plan.shift or x.converted else "one_row"
    numbers = (x.eps,) if kernel == "one_row" else (len(y) if groups else x.n, x.eps)
    arguments = [*(w.data for w in matrices), *missing, *given, *numbers]
    kernels.launch(
        kernel,
        kernel,
        (plan.blocks, len(groups.group) if groups else 1),
        32 * plan.warps,
        arguments,
        max(plan.shared_bytes, kernels.shared_limit // 3 + 1),  # so that no multiprocessor has more than two blocks
        overlap=True,
        what=first.name,
        constants=plan.constants if kernels.for_plans else (),
    )


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


def plan_of(
    kernels: Kernels,
    x: Rows,
    matrices: Sequence[PackedMatrix],
    *,
    activation: Activation = Activation.NONE,
    has: Has = Has(0),
    groups: Groups | None = None,
) -> Plan:
    """The plan of `multiply`. has: of bias, residual and squares, what there is.

    Raises KernelError if the rows need more shared memory than a block may have.
    """
    first = matrices[0]
    has |= Has.FORM * bool(x.converted) | Has.NORM * bool(x.norm) | Has.GROUPS * bool(groups)
    has |= Has.KNOWN_GROUPS * bool(groups and groups.known)
    n_rows, n_groups = (groups.most, len(groups.group)) if groups else (x.n, 1)
    device = (kernels.n_multiprocessors, kernels.shared_limit)
    sizes = tuple(Matrix(w.type, w.shape[-2]) for w in matrices)
    most_warps = WARPS_FOR_PLAN if kernels.for_plans and x.converted else MOST_WARPS
    plan = _plan(sizes, first.shape[-1], activation, Has(has), n_rows, n_groups, most_warps, *device)
    if plan.shared_bytes > kernels.shared_limit:
        raise KernelError(
            f"{first.name}: {n_rows} rows of {first.shape[-1]} need {plan.shared_bytes} bytes of shared memory, "
            f"the device has {kernels.shared_limit}"
        )
    return plan


def can_prepare(matrices: Sequence[PackedMatrix], n_rows: int) -> bool:
    """Whether a block of threads has room to convert its rows, up to n_rows, for a product with these matrices, even if
    it is gated. The same on all devices, because it decides which buffers a step has."""
    first = matrices[0]
    sides = [Matrix(max((w.type for w in matrices), key=segment_bytes), TILE_ROWS)] * 2
    shift = max(0, n_rows - 1).bit_length()
    one = {"blocks": 1, "warps": 1, "chunk": 1}
    return Plan.of(sides, first.shape[-1], Activation.SWIGLU, Has(0), shift=shift, **one).shared_bytes <= LEAST_SHARED


@lru_cache(maxsize=4096)
def _plan(
    matrices: tuple[Matrix, ...],
    n_in: int,
    activation: Activation,
    has: Has,
    n_rows: int,
    n_groups: int,
    most_warps: int,
    n_multiprocessors: int,
    shared_limit: int,
) -> Plan:
    """The plan for blocks of n_rows rows at most. n_groups: the groups of rows, or of rows of one expert."""
    shift = max(0, n_rows - 1).bit_length()
    n_side_by_side = 2 if activation.gated else 1
    n_out = matrices[0].n_out if activation.gated else sum(m.n_out for m in matrices)
    items_each = n_side_by_side * n_segments(n_in)
    n_tiles = -(-n_out // TILE_ROWS)
    # Small matrices: a block on each multiprocessor, beside one of the next kernel. Larger ones: two, to use all of it.
    large = n_tiles * items_each * n_groups > BUSY * n_multiprocessors
    wanted = n_multiprocessors * (BLOCKS_EACH if large else 1)
    blocks = max(1, min(n_tiles, -(-wanted // n_groups)))
    tiles_each = -(-n_tiles // blocks)  # at most
    half = min(HALF_SHARED, shared_limit)
    prepares = not has & Has.FORM
    most = min(most_warps, max(tiles_each * items_each, PREPARING_WARPS if prepares else LEAST_WARPS))

    def plan(warps: int, chunk: int) -> Plan:
        sizes = {"blocks": blocks, "warps": warps, "shift": shift, "chunk": chunk}
        return Plan.of(matrices, n_in, activation, has, **sizes)

    found = plan(most, tiles_each)
    if shift and found.shared_bytes <= half:  # items by segment, see few_rows.cuh
        return found
    chunk = max(1, min(tiles_each, (8 << 10) // (n_side_by_side * sums_bytes(n_in, shift))))
    for warps in range(most, 0, -1):
        found = plan(warps, chunk)
        if found.shared_bytes <= (half if warps > LEAST_WARPS else shared_limit):
            break
    return found


def sums_bytes(n_in: int, shift: int) -> int:
    """The bytes of the segments' sums of a tile: of each output and row some float4, no multiple of four of them."""
    fours = -(-n_segments(n_in) // 4)
    return 16 * TILE_ROWS * (fours + (fours % 4 == 0)) << shift
