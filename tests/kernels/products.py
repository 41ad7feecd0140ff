"""Rows of activations and products by raw launches, for tests of several kernel files."""

from typing import Any

import numpy as np

from refengine.cuda.kernels.few_rows import shared_bytes
from refengine.cuda.kernels.moe import NO_GROUPS
from refengine.cuda.kernels.quantize_rows import padded
from refengine.cuda.layout import pack
from refengine.cuda.runtime.source import Struct
from tests.kernels.runner import Kernels


def prepared(module: Kernels, x: np.ndarray, warps: int = 4, order: int = 0) -> list[np.ndarray]:
    """Halves, block sums and scales of rows: what the product's kernels take."""
    n_rows, n_in = x.shape
    width = padded(n_in)
    halves, scale = np.zeros((n_rows, width), np.float16), np.zeros(n_rows, np.float32)
    sums = np.zeros((n_rows, width // 32), np.uint32)
    module.launch("quantize_rows_f16", (n_rows,), (32 * warps,), [x, halves, scale, sums, np.int32(n_in)], order=order)
    return [halves, sums, scale]


def activations_of(given: list[Any]) -> Struct:
    """The struct `Activations`: halves, sums and scales of rows; or None for each, floats, a norm's weight and bias."""
    return Struct(*given, *[None] * (6 - len(given)))


def product(
    module: Kernels,
    kernel: str,
    w: Any,
    given: list[Any],
    bias: np.ndarray | None,
    warps: int = 4,
    residual: np.ndarray | None = None,
    eps: float = 0.0,
) -> np.ndarray:
    """given: see `activations_of`. eps: of the norm."""
    n_out, n_in = w.shape
    n_rows = len(given[0] if given[0] is not None else given[3])
    y = np.full((n_rows, n_out), np.nan, np.float32)
    tiles = -(-n_out // 16)
    sizes = [n_out, n_in, n_rows]
    arguments = [pack(np, w).struct, activations_of(given), NO_GROUPS, bias, residual, y, *sizes]
    name = f"{kernel}_{w.type.name.lower()}"
    if not kernel.startswith("rows8"):
        module.launch(name, (-(-tiles // warps), -(-n_rows // 64)), (32 * warps,), arguments)
        return y
    blocks = max(1, tiles - warps + 1)  # some have several tiles
    last, shared = few_rows(w, n_rows, warps, prepares=given[0] is None)
    module.launch(name, (blocks, -(-n_rows // 8)), (32 * warps,), [*arguments, *last, eps], shared)
    return y


def few_rows(
    w: Any, n_rows: int, warps: int, *, prepares: bool = False, n_matrices: int = 1, chunk: int = 2
) -> tuple[list[int], int]:
    """The arguments shift and chunk of the kernels of few_rows.cuh, and their shared memory."""
    shift = min(n_rows - 1, 7).bit_length()
    shared = shared_bytes(w.type, w.shape[-1], warps, chunk, shift, n_matrices, prepares=prepares, norm=prepares)
    return [shift, chunk], shared
