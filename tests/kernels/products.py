"""Rows of activations and products by raw launches, for tests of several kernel files."""

from typing import Any

import numpy as np

from refengine.cuda.kernels.moe import NO_GROUPS
from refengine.cuda.layout import pack
from refengine.cuda.runtime.source import Struct
from tests.kernels.runner import Kernels


def prepared(module: Kernels, x: np.ndarray, warps: int = 4, order: int = 0) -> list[np.ndarray]:
    """Halves, block sums and scales of rows: what the product's kernels take."""
    n_rows, n_in = x.shape
    halves, scale = np.zeros((n_rows, n_in), np.float16), np.zeros(n_rows, np.float32)
    sums = np.zeros((n_rows, n_in // 32), np.uint32)
    module.launch("quantize_rows_f16", (n_rows,), (32 * warps,), [x, halves, scale, sums, np.int32(n_in)], order=order)
    return [halves, sums, scale]


def product(
    module: Kernels,
    kernel: str,
    w: Any,
    given: list[np.ndarray],
    bias: np.ndarray | None,
    warps: int = 4,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    n_out, n_in = w.shape
    n_rows = len(given[0])
    y = np.full((n_rows, n_out), np.nan, np.float32)
    tiles, segments = -(-n_out // 16), -(-n_in // 256)
    few = kernel.startswith("rows8")
    blocks = max(1, tiles - warps + 1)  # some have several tiles
    grid = (blocks, -(-n_rows // 8)) if few else (-(-tiles // warps), -(-n_rows // 64))
    sizes = [np.int32(n_out), np.int32(n_in), np.int32(n_rows)]
    arguments = [pack(np, w).struct, Struct(*given), NO_GROUPS, bias, residual, y, *sizes]
    module.launch(f"{kernel}_{w.type.name.lower()}", grid, (32 * warps,), arguments, 1024 * segments if few else 0)
    return y
