"""Products with quantised and F16 weights: bindings of kernels_cu/matmul.cu. `linear` also accepts F32 and BF16."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels import matmul_f32
from refengine.cuda.kernels.moe import NO_GROUPS, Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import TILE_ROWS, PackedMatrix
from refengine.cuda.runtime.launch import Kernels

FEW_ROWS, MANY_ROWS = 8, 64  # rows per block of rows8_* and of rows64_*
SEGMENT = 256  # columns whose products are summed up before segments are added
WIDE = ("q8_0", "q4_k", "mxfp4")  # types for which 20 warps fit on a multiprocessor; for the others 16


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
) -> None:
    """y = x wᵀ + bias + residual; with groups, each row is multiplied with the matrix of its expert.

    x: in the form that w's type needs. w: (n_out, n_in), or (n_expert, n_out, n_in) with groups. y, residual: (n_rows,
    n_out) float32; bias: (n_out,), or (n_expert, n_out). The sums do not depend on the number of rows or the grouping.
    """
    n_out, n_in = w.shape[-2:]
    x.check(w.name, n_in, floats=w.is_float)
    check_shape(w.name, "the output", y, (len(groups.y_rows) if groups else x.n, n_out))
    check_shape(w.name, "the bias", bias, w.shape[:-1])
    check_shape(w.name, "the residual", residual, y.shape)
    if w.is_float:
        matmul_f32.linear(kernels, x, w, y, bias=bias, residual=residual, groups=groups, overlap=overlap)
        return
    kind = w.type.name.lower()
    size = groups.size if groups else FEW_ROWS if x.n <= FEW_ROWS else MANY_ROWS
    n_groups = len(groups.group) if groups else -(-x.n // size)
    struct = groups.struct if groups else NO_GROUPS
    arguments = [w.struct, x.struct, struct, bias, residual, y, n_out, n_in, x.n]
    tiles = -(-n_out // TILE_ROWS)
    if size == FEW_ROWS:
        n_segments = -(-n_in // SEGMENT)
        blocks, warps = rows8_launch(kind, tiles, n_segments, n_groups, kernels.n_multiprocessors)
        shared, grid = 1024 * n_segments, (blocks, n_groups)
        kernels.launch("matmul", f"rows8_{kind}", grid, 32 * warps, arguments, shared, overlap=True, what=w.name)
    else:
        kernels.launch("matmul", f"rows64_{kind}", (-(-tiles // 4), n_groups), 128, arguments, what=w.name)


def group_size(w: PackedMatrix, n_pairs: int) -> int:
    """How many pairs of one expert a product with w (n_expert, n_out, n_in) computes together."""
    return FEW_ROWS if w.is_float or n_pairs <= FEW_ROWS * w.shape[0] else MANY_ROWS


def rows8_launch(kind: str, n_tiles: int, n_segments: int, n_groups: int, n_multiprocessors: int) -> tuple[int, int]:
    """The number of blocks, and of warps per block, for rows8_*. The sums do not depend on them.

    Chooses the number of warps with the shortest estimated time: a multiprocessor with n warps needs n + 8 units for
    one segment of each warp (8 is the time that a single warp waits for its loads), for each tile and each segment of a
    warp. F16, which only waits for memory, gets as many warps as possible. If there are many more tiles than blocks
    that run at the same time, each block computes several tiles (3 to 5 % faster for 600 MB, measured on an H200).
    """
    most, resident = (10, 20) if kind in WIDE else (8, 16)
    best: tuple[int, int, int] | None = None
    for warps in range(min(most, n_segments) if kind == "f16" else 1, min(most, n_segments) + 1):
        per_multiprocessor = resident // warps  # blocks
        at_once = max(1, n_multiprocessors * per_multiprocessor // n_groups)
        rounds = -(-n_tiles // at_once)
        busy = min(per_multiprocessor, -(-n_tiles * n_groups // n_multiprocessors)) * warps
        units = rounds * -(-n_segments // warps) * (busy + 8)
        if best is None or units < best[0]:
            best = units, n_tiles if rounds <= 3 else -(-n_tiles // rounds), warps
    assert best is not None
    return best[1:]


def narrow_launch(kernels: Kernels, w: PackedMatrix, n_out: int, n_items: int, n_groups: int) -> tuple[int, int]:
    """`rows8_launch` for the kernels of gate_up.cu and qkv.cu, of which 16 warps fit on a multiprocessor."""
    kind = "f16" if w.type.name == "F16" else "q4_0"
    return rows8_launch(kind, -(-n_out // TILE_ROWS), n_items, n_groups, kernels.n_multiprocessors)
