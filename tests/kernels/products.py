"""Rows of activations and products by raw launches, for tests of several kernel files."""

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine.cuda.kernels.few_rows import Activation, Has, Matrix, Plan
from refengine.cuda.kernels.matmul import ManyRowsLaunch
from refengine.cuda.kernels.moe import NO_GROUPS
from refengine.cuda.kernels.quantize_rows import Converted, n_segments
from refengine.cuda.layout import pack
from refengine.cuda.runtime.source import Struct
from tests.kernels.runner import Kernels


def prepared(
    module: Kernels,
    x: np.ndarray,
    warps: int = 4,
    order: int = 0,
    *,
    halves: bool = False,
    squares: np.ndarray | None = None,
    norm: np.ndarray | None = None,
    eps: float = 0.0,
) -> list[np.ndarray]:
    """Data, sums and scales of rows: what the product's kernels take. norm, eps: of a norm in front, which needs the
    rows' squares.
    """
    n_rows, n_in = x.shape
    data, sums, scale = Converted.shapes(n_rows, n_in)
    given: list[np.ndarray] = [np.zeros(data, np.uint8), np.zeros(sums, np.int32), np.zeros(scale, np.float32)]
    outputs = (given[0], given[2], given[1])
    arguments = [x, squares, norm, *outputs, np.int32(n_in), np.int32(halves), np.float32(eps)]
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
    for_plan: bool = False,
) -> np.ndarray:
    """`few_rows.multiply` with other launches than it chooses. given: see `activations_of`. eps: of the norm. for_plan:
    by a kernel for this plan alone.
    """
    prepares = given[0] is None
    n_rows = len(given[3] if prepares else given[0])
    parts = [w.shape[0] for w in matrices]
    y = np.full((n_rows, parts[0] if activation.gated else sum(parts)), np.nan, np.float32)
    tiles, shift = -(-y.shape[1] // 16), min(n_rows - 1, 7).bit_length()
    blocks = blocks or max(1, tiles - warps + 1)  # some have several tiles
    has = Has(0 if prepares else Has.FORM) | (Has.NORM if len(given) == 6 and given[5] is not None else Has(0))
    has |= Has.BIAS if any(bias is not None for bias in biases) else Has(0)
    has |= (Has(0) if residual is None else Has.RESIDUAL) | (Has(0) if squares is None else Has.SQUARES)
    sizes = {"blocks": blocks, "warps": warps, "shift": shift, "chunk": chunk}
    plan = Plan.of([Matrix(w.type, w.shape[0]) for w in matrices], matrices[0].shape[1], activation, has, **sizes)
    missing = [None] * (3 - len(matrices))
    weights = [*(pack(np, w).data for w in matrices), *missing]
    grid, threads, shared = (blocks, -(-n_rows // 8)), (32 * warps,), plan.shared_bytes
    kernel = "one_row" if prepares and not shift else "few_rows"
    numbers = () if kernel == "one_row" else (n_rows,)
    rest = (*biases, *missing, residual, y, squares, plan.struct, *numbers, np.float32(eps))
    arguments = [*weights, activations_of(given), NO_GROUPS, *rest]
    module.of(kernel, plan.constants if for_plan else ()).launch(kernel, grid, threads, arguments, shared)
    return y
