"""How the kernels of kernels_cu/few_rows.cuh are launched: products with up to 8 rows, for a decode step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from refengine.cuda.kernels.quantize_rows import BLOCK, Rows
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, segment_bytes
from refengine.errors import KernelError

FEW_ROWS = 8  # rows per block of threads
SEGMENT = 256  # columns whose products are summed up before segments are added
WIDE = ("Q4_K", "MXFP4")  # types of which 12 warps fit on half a multiprocessor; of the others 8
# Bytes of shared memory for one block, so that a block of the next kernel fits on the multiprocessor as well.
HALF_SHARED, MOST_SHARED = 112 << 10, 227 << 10
MOST_STAGES = 4
RING_BYTES = 80 << 10  # of weights on their way to a multiprocessor; 33 KiB hide the memory's latency


@dataclass(frozen=True)
class FewRowsLaunch:
    """Blocks of a group of rows, warps of a block, bytes of shared memory, and the arguments that the kernels take last."""

    blocks: int
    warps: int
    shared_bytes: int
    capacity: int
    stages: int
    chunk: int
    eps: float

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def arguments(self) -> tuple[int, int, int, float]:
        return self.capacity, self.stages, self.chunk, self.eps


def few_rows_launch(
    w: PackedMatrix, n_out: int, x: Rows, n_rows: int, n_groups: int, n_multiprocessors: int, n_matrices: int = 1
) -> FewRowsLaunch:
    """The launch for a product of rows x with n_matrices matrices like w side by side, of n_out outputs in all.

    n_rows: the most rows in a block of threads. n_groups: the groups of rows, or of experts' rows. Raises KernelError if
    the rows need more shared memory than a multiprocessor has.
    """
    norm = x.halves is None and x.norm is not None
    size = (w.type.name, w.shape[-1], n_out, n_rows, n_groups, n_multiprocessors, n_matrices, x.halves is None, norm)
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
    capacity = 1 << max(0, n_rows - 1).bit_length()
    per_tile = n_matrices * -(-n_in // SEGMENT)
    n_tiles = -(-n_out // TILE_ROWS)
    # One block on each multiprocessor. Some of many groups are empty, so twice as many blocks then keep it busy.
    wanted = n_multiprocessors if n_groups <= 4 else 2 * n_multiprocessors
    blocks = max(1, min(n_tiles, -(-wanted // n_groups)))
    tiles_each = -(-n_tiles // blocks)
    blocks = -(-n_tiles // tiles_each)  # as many as are needed for this
    warps = min(12 if kind in WIDE else 8, max(tiles_each * per_tile, 4))
    chunk = max(1, min(tiles_each, (8 << 10) // (per_tile * 64 * capacity)))
    sizes = (kind, n_in, warps)
    rest = (chunk, capacity, n_matrices)
    items = -(-tiles_each * per_tile // warps)
    stages = max(1, min(MOST_STAGES, items, RING_BYTES // (warps * segment_bytes(kind))))
    while stages > 2 and shared_bytes(*sizes, stages, *rest, prepares=prepares, norm=norm) > HALF_SHARED:
        stages -= 1
    shared = shared_bytes(*sizes, stages, *rest, prepares=prepares, norm=norm)
    return FewRowsLaunch(blocks, warps, shared, capacity, stages, chunk, 0.0)


def shared_bytes(
    kind: str,
    n_in: int,
    warps: int,
    stages: int,
    chunk: int,
    capacity: int,
    n_matrices: int,
    *,
    prepares: bool,
    norm: bool,
) -> int:
    """The bytes of shared memory of a block. prepares: it converts its rows to halves; norm: after a norm."""
    ring = warps * stages * (segment_bytes(kind) + 16)  # weights, and the barriers of their copies
    sums = 2 * chunk * n_matrices * -(-n_in // SEGMENT) * 64 * capacity
    rows = capacity * (2 * (n_in + 32) + 4 * aligned_blocks(n_in)) + 8 * n_in * norm if prepares else 0
    return ring + 160 + sums + rows


def aligned_blocks(n_in: int) -> int:
    """The number of block sums of a row in shared memory: a multiple of 4."""
    return -(-n_in // (4 * BLOCK)) * 4
