"""The router of a mixture of experts in one launch, for few rows: bindings of kernels_cu/router.cu."""

from __future__ import annotations

from refengine.array import Array
from refengine.cuda.kernels.moe import MOST_USED, Groups, most_groups
from refengine.cuda.kernels.norm import THREADS, norm_bytes
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError

MOST_PAIRS = 128  # maximum number of pairs of row and rank, because a thread of the last block handles each
MOST_EACH = 8  # experts per block: a warp computes one
MOST_SHARED = 96 << 10  # bytes of shared memory that every architecture has for a block


def fits(w: PackedMatrix, n_rows: int, n_used: int) -> bool:
    """Whether `route` supports a router's matrix w (n_expert, n_in) and so many experts for each of n_rows rows."""
    if not w.is_float or len(w.shape) != 2:
        return False
    n_expert, n_in = w.shape
    return (
        1 <= n_used <= min(n_expert, MOST_USED)
        and n_rows * n_used <= MOST_PAIRS
        and n_in * _item_bytes(w) % 16 == 0
        and _shared_bytes(w, n_rows, 1) <= MOST_SHARED
    )


def route(
    kernels: Kernels,
    x: Array,
    norm: Array | None,
    eps: float,
    w: PackedMatrix,
    bias: Array | None,
    positions: Array,
    counter: Array,
    scores: Array,
    shares: Array,
    groups: Groups,
) -> None:
    """Choose experts by scores = rms_norm(x, norm, eps) wᵀ + bias; without norm, x is not normed. Overlaps.

    x (n, n_in), norm (n_in,), bias (n_expert,) float32; positions (n,) int32, below zero for rows without a sequence,
    which choose no experts; counter (1,) int32: zero, and zero again afterwards. Fills scores (n, n_expert), shares
    (n, n_used) float32, the softmax over the chosen experts' scores, and `groups` of n · n_used pairs.
    """
    n, n_used = shares.shape
    if not fits(w, n, n_used):
        raise KernelError(
            f"{w.name}: the router does not support {w.type.name} {w.shape}, {n} rows, {n_used} experts each"
        )
    n_expert, n_in = w.shape
    check_shape(w.name, "the rows' array", x, (n, n_in))
    check_shape(w.name, "the norm's weight", norm, (n_in,))
    check_shape(w.name, "the bias", bias, (n_expert,))
    check_shape(w.name, "the positions' array", positions, (n,))
    check_shape(w.name, "the counter", counter, (1,))
    check_shape(w.name, "the scores' array", scores, (n, n_expert))
    check_shape(w.name, "the groups' array", groups.group, (most_groups(n * n_used, n_expert, groups.size), 3))
    check_shape(w.name, "the array of rows read", groups.x_rows, (n * n_used,))
    check_shape(w.name, "the array of rows written", groups.y_rows, (n * n_used,))
    # As few experts per block as there are multiprocessors for, so that many read weights at the same time.
    each = min(MOST_EACH, -(-n_expert * n // kernels.n_multiprocessors))
    while _shared_bytes(w, n, each) > MOST_SHARED:
        each -= 1
    inputs = [w.float_rows, x, norm, bias, positions]
    outputs = [scores, counter, shares, groups.group, groups.x_rows, groups.y_rows]
    sizes = [n_in, n_expert, n_used, len(groups.group), groups.size, each, float(eps)]
    grid, shared = (-(-n_expert // each), n), _shared_bytes(w, n, each)
    kernel = f"router_{w.type.name.lower()}"
    kernels.launch("router", kernel, grid, THREADS, [*inputs, *outputs, *sizes], shared, overlap=True, what=w.name)


def _item_bytes(w: PackedMatrix) -> int:
    return 4 if w.type.name == "F32" else 2


def _shared_bytes(w: PackedMatrix, n_rows: int, each: int) -> int:
    """The shared memory of a block: its experts' weights, a row and the norm; later the scores of all rows."""
    n_expert, n_in = w.shape
    return max(each * n_in * _item_bytes(w) + 8 * n_in + norm_bytes(n_in), 4 * n_rows * n_expert)
