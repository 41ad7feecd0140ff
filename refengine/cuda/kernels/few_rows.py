"""How the kernels of kernels_cu/few_rows.cuh are launched: products with up to 8 rows, as in a decode step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gguf import GGMLQuantizationType

from refengine.cuda.kernels.quantize_rows import Rows, padded
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, segment_bytes
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError

FEW_ROWS = 8  # rows per block of threads
SEGMENT = 256  # columns whose products are summed up before segments are added
TOGETHER = 2  # segments whose sums a warp computes side by side
STAGES = 2  # of a warp's ring, each with the weights of as many segments
MOST_WARPS, LEAST_WARPS = 10, 4  # the registers of 10 warps fit half a multiprocessor
BUSY = 20  # items for each multiprocessor from which two blocks are faster than one
HALF_SHARED = 113 << 10  # bytes for one block, so that a block of the next kernel fits on the multiprocessor as well
LEAST_SHARED = 99 << 10  # bytes that a block may have on every supported device; sm_86 and sm_89 have no more


@dataclass(frozen=True)
class FewRowsLaunch:
    """Blocks for each group of rows, warps per block, bytes of shared memory, and the kernels' last arguments."""

    blocks: int
    warps: int
    shared_bytes: int
    arguments: tuple[int, int]  # shift, chunk: see few_rows.cuh

    @property
    def threads(self) -> int:
        return 32 * self.warps


def few_rows_launch(
    kernels: Kernels, w: PackedMatrix, n_out: int, x: Rows, n_rows: int, n_groups: int = 1, n_matrices: int = 1
) -> FewRowsLaunch:
    """The launch for a product of rows x with matrices like w: n_out outputs of each of n_matrices side by side.

    n_rows: the most rows in a block of threads. n_groups: the groups of rows, or of rows of one expert. Raises
    KernelError if the rows need more shared memory than a block may have.
    """
    device = (kernels.n_multiprocessors, kernels.shared_limit)
    launch = _launch(
        w.type, w.shape[-1], n_out, n_rows, n_groups, n_matrices, *device, x.halves is None, x.norm is not None
    )
    if launch.shared_bytes > kernels.shared_limit:
        raise KernelError(f"{w.name}: {n_rows} rows of {w.shape[-1]} need {launch.shared_bytes} bytes of shared memory")
    return launch


def can_prepare(w: PackedMatrix, n_rows: int, *, norm: bool, n_matrices: int = 1) -> bool:
    """Whether a block of threads has room to convert its rows, up to n_rows, after a norm or not, for a product with
    n_matrices matrices like w side by side. The same on all devices, because it decides which buffers a step has."""
    shift = max(0, n_rows - 1).bit_length()
    return shared_bytes(w.type, w.shape[-1], 1, 1, shift, n_matrices, prepares=True, norm=norm) <= LEAST_SHARED


@lru_cache(maxsize=4096)
def _launch(
    kind: GGMLQuantizationType,
    n_in: int,
    n_out: int,
    n_rows: int,
    n_groups: int,
    n_matrices: int,
    n_multiprocessors: int,
    shared_limit: int,
    prepares: bool,
    norm: bool,
) -> FewRowsLaunch:
    shift = max(0, n_rows - 1).bit_length()
    sums_each = n_matrices * -(-n_in // SEGMENT)
    items_each = n_matrices * -(-n_in // (TOGETHER * SEGMENT))
    n_tiles = -(-n_out // TILE_ROWS)
    # Small matrices: a block on each multiprocessor, beside one of the next kernel. Larger ones: two, to use all of it.
    large = n_tiles * items_each * n_groups > BUSY * n_multiprocessors
    wanted = n_multiprocessors * (2 if large else 1)
    blocks = max(1, min(n_tiles, -(-wanted // n_groups)))
    tiles_each = -(-n_tiles // blocks)
    blocks = -(-n_tiles // tiles_each)  # as many as are needed for this
    chunk = max(1, min(tiles_each, (8 << 10) // (sums_each * 64 << shift)))
    warps = min(MOST_WARPS, max(tiles_each * items_each, LEAST_WARPS))

    def shared(warps: int) -> int:
        return shared_bytes(kind, n_in, warps, chunk, shift, n_matrices, prepares=prepares, norm=norm)

    while warps > LEAST_WARPS and shared(warps) > min(HALF_SHARED, shared_limit):
        warps -= 1
    while warps > 1 and shared(warps) > shared_limit:
        warps -= 1
    return FewRowsLaunch(blocks, warps, shared(warps), (shift, chunk))


def shared_bytes(
    kind: GGMLQuantizationType,
    n_in: int,
    warps: int,
    chunk: int,
    shift: int,
    n_matrices: int,
    *,
    prepares: bool,
    norm: bool,
) -> int:
    """The bytes of shared memory of a block. prepares: it converts its rows to halves; norm: after a norm."""
    ring = warps * STAGES * TOGETHER * segment_bytes(kind)
    sums = 2 * chunk * n_matrices * -(-n_in // SEGMENT) * 64 << shift
    rows = (4 * padded(n_in) + 64 + padded(n_in) // 8 << shift) + 4 * n_in * norm if prepares else 0
    return ring + 576 + sums + rows
