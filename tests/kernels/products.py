"""Rows of activations and products by raw launches, for tests of several kernel files."""

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine.cuda.kernels.few_rows import Activation, kind_of, shared_bytes, stage_bytes
from refengine.cuda.kernels.matmul import ManyRowsLaunch
from refengine.cuda.kernels.moe import NO_GROUPS
from refengine.cuda.kernels.quantize_rows import Converted, n_segments
from refengine.cuda.layout import pack, tile_bytes
from refengine.cuda.runtime.source import Struct
from tests.kernels.runner import Kernels


def prepared(
    module: Kernels, x: np.ndarray, warps: int = 4, order: int = 0, *, halves: bool = False
) -> list[np.ndarray]:
    """Data, sums and scales of rows: what the product's kernels take."""
    n_rows, n_in = x.shape
    data, sums, scale = Converted.shapes(n_rows, n_in)
    given: list[np.ndarray] = [np.zeros(data, np.uint8), np.zeros(sums, np.int32), np.zeros(scale, np.float32)]
    arguments = [x, given[0], given[2], given[1], np.int32(n_in), np.int32(halves)]
    module.launch("quantize_rows", (n_rows, -(-n_segments(n_in) // warps)), (32 * warps,), arguments, order=order)
    return given


def prepared_for(w: Any, module: Kernels, x: np.ndarray) -> list[np.ndarray]:
    """The same in the form that a product with this matrix reads."""
    return prepared(module, x, halves=w.type == GGMLQuantizationType.F16)


def activations_of(given: list[Any]) -> Struct:
    """The struct `Activations`: data, sums and scales of rows; or None for each, floats, squares, a norm's weight."""
    return Struct(*given, *[None] * (6 - len(given)))


def product(
    module: Kernels,
    w: Any,
    given: list[Any],
    bias: np.ndarray | None,
    warps: int = 4,
    residual: np.ndarray | None = None,
    eps: float = 0.0,
) -> np.ndarray:
    """The product by the kernels of matmul.cu or few_rows.cu, whichever `module` has.

    given: see `activations_of`. eps: of the norm.
    """
    if "few_rows" in module.module.source.kernels:
        return few_rows(module, [w], given, [bias], warps=warps, residual=residual, eps=eps)
    n_out, n_in = w.shape
    n_rows = len(given[0])
    y = np.full((n_rows, n_out), np.nan, np.float32)
    arguments = [pack(np, w).data, activations_of(given), NO_GROUPS, bias, residual, y, n_out, n_in, n_rows]
    if w.type == GGMLQuantizationType.F16:
        module.launch("rows64_f16", (-(-n_out // (16 * warps)), -(-n_rows // 64)), (32 * warps,), arguments)
        return y
    launch = ManyRowsLaunch(w.type, 2, warps, 1, 2, 64)
    grid = launch.grid(-(-n_out // 16), n_rows, None)
    module.launch(launch.kernel, grid, (launch.threads,), [*arguments, *launch.arguments], launch.shared_bytes)
    return y


def few_rows(
    module: Kernels,
    matrices: list[Any],
    given: list[Any],
    biases: list[np.ndarray | None],
    *,
    activation: Activation = Activation.NONE,
    warps: int = 4,
    blocks: int | None = None,
    chunk: int = 2,
    residual: np.ndarray | None = None,
    eps: float = 0.0,
    squares: np.ndarray | None = None,
    early: int = 1,
) -> np.ndarray:
    """`few_rows.multiply` with other launches than it chooses. given: see `activations_of`. eps: of the norm."""
    n_in = matrices[0].shape[1]
    gated = activation.gated
    n_out = matrices[0].shape[0] if gated else sum(w.shape[0] for w in matrices)
    prepares = given[0] is None
    n_rows = len(given[3] if prepares else given[0])
    y = np.full((n_rows, n_out), np.nan, np.float32)
    tiles, missing = -(-n_out // 16), 3 - len(matrices)
    below = 1 if gated else len(matrices)
    begins = [sum(w.shape[0] for w in matrices[:i]) // 16 if i < below else tiles for i in (1, 2)]
    shift = min(n_rows - 1, 7).bit_length()
    stage = stage_bytes(tuple(w.type for w in matrices))
    grid = (blocks or max(1, tiles - warps + 1), -(-n_rows // 8))  # some have several tiles
    tiles_each = -(-tiles // grid[0])
    shared = shared_bytes(stage, n_in, warps, chunk, tiles_each, shift, gated, prepares=prepares)
    structs = [pack(np, w).data for w in matrices] + [None] * missing
    arrays = [*structs, activations_of(given), NO_GROUPS, *biases, *[None] * missing, residual, y, squares]
    kinds = [kind_of(w.type) for w in matrices] + [0] * missing
    of_tiles = [tile_bytes(w.type, n_in) for w in matrices] + [0] * missing
    sizes = [*kinds, *of_tiles, *begins, int(activation), n_out, n_in, n_rows, shift, chunk, stage, early, tiles_each]
    sizes += [*divmod(warps, n_segments(n_in)), np.float32(eps)]
    module.launch("one_row" if prepares and not shift else "few_rows", grid, (32 * warps,), [*arrays, *sizes], shared)
    return y
