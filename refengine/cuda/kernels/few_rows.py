"""How the kernels of kernels_cu/few_rows.cuh are launched: products with up to 8 rows, for a decode step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from refengine.cuda.kernels.quantize_rows import Rows, padded
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, segment_bytes
from refengine.errors import KernelError

FEW_ROWS = 8  # rows per block of threads
SEGMENT = 256  # columns whose products are summed up before segments are added
MOST_WARPS = 10  # of which the registers fit half a multiprocessor
BUSY = 20  # items for each multiprocessor from which two blocks are faster than one
TOGETHER = 2  # segments whose sums a warp computes side by side
STAGES = 2  # of a warp's ring, each with the weights of as many segments
REHEARSES = True  # whether blocks beside the previous kernel's fetch their instructions before it ends
# Bytes of shared memory for one block, so that a block of the next kernel fits on the multiprocessor as well.
HALF_SHARED, MOST_SHARED = 113 << 10, 227 << 10


@dataclass(frozen=True)
class FewRowsLaunch:
    """Blocks of a group of rows, warps of a block, bytes of shared memory, and the arguments that the kernels take last."""

    blocks: int
    warps: int
    shared_bytes: int
    shift: int
    chunk: int
    rehearses: bool
    eps: float

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def arguments(self) -> tuple[int, int, bool, float]:
        return self.shift, self.chunk, self.rehearses, self.eps


def few_rows_launch(
    w: PackedMatrix, n_out: int, x: Rows, n_rows: int, n_groups: int, n_multiprocessors: int, n_matrices: int = 1
) -> FewRowsLaunch:
    """The launch for a product of rows x with n_matrices matrices like w side by side, of n_out outputs in all.

    n_rows: the most rows in a block of threads. n_groups: the groups of rows, or of experts' rows. Raises KernelError if
    the rows need more shared memory than a multiprocessor has.
    """
    size = (w.type.name, w.shape[-1], n_out, n_rows, n_groups, n_multiprocessors, n_matrices, x.halves is None)
    size += (x.norm is not None,)
    launch = _launch(*size)
    if launch.shared_bytes > MOST_SHARED:
        raise KernelError(f"{w.name}: {n_rows} rows of {w.shape[-1]} need {launch.shared_bytes} bytes of shared memory")
    return launch if x.norm is None else FewRowsLaunch(**{**launch.__dict__, "eps": x.norm.eps})


@lru_cache(maxsize=4096)
def _launch(
    kind: str,
    n_in: int,
    n_out: int,
    n_rows: int,
    n_groups: int,
    n_multiprocessors: int,
    n_matrices: int,
    prepares: bool,
    norm: bool,
) -> FewRowsLaunch:
    shift = max(0, n_rows - 1).bit_length()
    capacity = 1 << shift
    sums_each = n_matrices * -(-n_in // SEGMENT)
    items_each = n_matrices * -(-n_in // (TOGETHER * SEGMENT))
    n_tiles = -(-n_out // TILE_ROWS)
    # Small matrices: a block on each multiprocessor, beside one of the next kernel. Larger ones: two, to use all of it.
    large = n_tiles * items_each * n_groups > BUSY * n_multiprocessors
    wanted = n_multiprocessors * (2 if large else 1)
    blocks = max(1, min(n_tiles, -(-wanted // n_groups)))
    tiles_each = -(-n_tiles // blocks)
    blocks = -(-n_tiles // tiles_each)  # as many as are needed for this
    chunk = max(1, min(tiles_each, (8 << 10) // (sums_each * 64 * capacity)))
    warps = min(MOST_WARPS, max(tiles_each * items_each, 4))

    def shared(warps: int) -> int:
        return shared_bytes(kind, n_in, warps, chunk, capacity, n_matrices, prepares=prepares, norm=norm)

    while warps > 4 and shared(warps) > HALF_SHARED:
        warps -= 1
    return FewRowsLaunch(blocks, warps, shared(warps), shift, chunk, REHEARSES and not large, 0.0)


def shared_bytes(
    kind: str,
    n_in: int,
    warps: int,
    chunk: int,
    capacity: int,
    n_matrices: int,
    *,
    prepares: bool,
    norm: bool,
) -> int:
    """The bytes of shared memory of a block. prepares: it converts its rows to halves; norm: after a norm."""
    ring = warps * STAGES * TOGETHER * segment_bytes(kind)
    sums = 2 * chunk * n_matrices * -(-n_in // SEGMENT) * 64 * capacity
    rows = capacity * (4 * padded(n_in) + 64 + padded(n_in) // 8) + 4 * n_in * norm if prepares else 0
    return ring + 576 + sums + rows
