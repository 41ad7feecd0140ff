"""Rounds activations as llama.cpp's x86 CPU backend does before a matrix product.

Each weight type has a partner type (`QuantFormat.partner`); the activation row is quantised to it, and integer dot
products follow. Sources: ggml/src/ggml-cpu/arch/x86/quants.c (`quantize_row_q8_0`, `quantize_row_q8_1`),
ggml/src/ggml-quants.c (`quantize_row_q8_K_ref`), ggml-cpu.c (`type_traits_cpu`). The plain, the llamafile and the tiled
matrix products of that backend all use these functions for their activations. The same source runs on NumPy and CuPy.

A NaN in a block makes the whole rounded block NaN, so that it is not lost; llama.cpp may turn it into a number.
"""

from __future__ import annotations

from types import ModuleType
from typing import cast

import numpy as np
from gguf import GGMLQuantizationType

from refengine.array import Array
from refengine.errors import ModelError
from refengine.quants.blocks import SUPPORTED, QuantFormat, require_supported

Type = GGMLQuantizationType


def _absmax(xp: ModuleType, blocks: Array) -> Array:
    """The largest magnitude of each block, (..., n_blocks, 1) f32; by halving, as NumPy reduces short rows slowly."""
    folded = xp.abs(blocks)
    while folded.shape[-1] > 1:
        half = folded.shape[-1] // 2
        folded = xp.maximum(folded[..., :half], folded[..., half:])
    return folded


def _quantize_q8(xp: ModuleType, x: Array) -> tuple[Array, Array]:
    """Q8_0's and Q8_1's codes (..., n_blocks, 32) i8 and unrounded scales d = max|x| / 127 (..., n_blocks, 1) f32.

    The codes are x * (127 / max|x|) rounded to nearest even, as on x86. Unlike in `quantize_row_q8_0_ref`, they are not
    computed with 1 / d, the rounded scale or `roundf`.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = _absmax(xp, blocks)
    inverse = xp.float32(127) / largest
    # inverse is infinite for rows of zeros and rows below 4e-37. Their scale is zero as float16, so any code is right.
    finite = xp.where(xp.isinf(inverse), xp.float32(0), inverse)
    scaled = blocks * finite
    return xp.rint(scaled, out=scaled).astype(xp.int8), largest / xp.float32(127)


def _quantize_q8_k(xp: ModuleType, x: Array) -> tuple[Array, Array]:
    """Q8_K's codes (..., n_blocks, 256) i8 and scales (..., n_blocks, 1) f32, which stay float32.

    The element with the largest magnitude (the first of several) becomes -127, so the scale has the opposite sign.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    at = xp.abs(blocks).argmax(axis=-1)[..., None]
    extreme = xp.take_along_axis(blocks, at, axis=-1)
    inverse = xp.float32(-127) / extreme
    vanishing = xp.isinf(inverse)  # a zero block, or one below 4e-37, where ggml's codes times its scale are zero
    finite = xp.where(vanishing, xp.float32(0), inverse)
    scale = xp.where(vanishing, xp.float32(0), xp.float32(1) / inverse)
    scaled = blocks * finite
    return xp.rint(scaled, out=scaled).astype(xp.int8), scale


def _half(xp: ModuleType, x: Array) -> Array:
    return x.astype(xp.float16).astype(xp.float32)


def _bfloat16(xp: ModuleType, x: Array) -> Array:
    """x rounded to the nearest bfloat16, ties to even (ggml-impl.h, `ggml_compute_fp32_to_bf16`)."""
    bits = x.view(xp.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
    quiet = (bits | 0x00400000) & 0xFFFF0000
    return xp.where(xp.isnan(x), quiet, rounded).astype(xp.uint32).view(xp.float32)


def _check_activation(xp: ModuleType, x: Array, fmt: QuantFormat) -> Array:
    rows = xp.ascontiguousarray(x, dtype=xp.float32)
    if rows.shape[-1] % fmt.block_size:
        raise ModelError(f"{fmt.name}: activation rows of {x.shape[-1]} are not a multiple of {fmt.block_size}")
    return rows


def quantize_activation(xp: ModuleType, x: Array, type_: GGMLQuantizationType) -> tuple[Array, Array]:
    """The integers and scales to which llama.cpp's CPU rounds an activation (..., n) for a quantised weight.

    Returns codes (..., n_blocks, block) i8 and scales (..., n_blocks, 1) f32: blocks of 32 with scales rounded to
    float16 (Q8_0, Q8_1), or blocks of 256 with float32 scales (Q8_K). The rounded activation is codes * scales. Raises
    ModelError for F32, F16 and BF16, whose partners have no blocks.
    """
    fmt = require_supported(type_, "quantize_activation")
    rows = _check_activation(xp, x, fmt)
    with np.errstate(all="ignore"):
        if fmt.partner in ("Q8_0", "Q8_1"):
            codes, scale = _quantize_q8(xp, rows)
            return codes, _half(xp, scale)
        if fmt.partner == "Q8_K":
            return _quantize_q8_k(xp, rows)
    raise ModelError(f"{fmt.name}: activations are rounded to {fmt.partner}, which has no integer codes")


def round_activation(xp: ModuleType, x: Array, type_: GGMLQuantizationType) -> Array:
    """`x` (..., n) f32 rounded as llama.cpp's x86 CPU does for a product with a weight of `type_`: (..., n) f32.

    F32: `x` itself. F16, BF16: rounded to that type. Others: quantised to Q8_0, Q8_1 or Q8_K and dequantised.
    Magnitudes above 65504 * 127 overflow the float16 scale of Q8_0 and Q8_1 to Inf, as in llama.cpp. Q4_1 and Q5_1 also
    need the term of `q8_1_residual`. Raises ModelError for an unsupported type, or a row that is not a multiple of the
    block.
    """
    fmt = require_supported(type_, "round_activation")
    if fmt.partner == "F32":
        return x
    rows = _check_activation(xp, x, fmt)
    with np.errstate(all="ignore"):
        if fmt.partner == "F16":
            return _half(xp, rows)
        if fmt.partner == "BF16":
            return _bfloat16(xp, rows)
        codes, scale = quantize_activation(xp, rows, type_)
        return (codes * scale).reshape(rows.shape)


def q8_1_sums(xp: ModuleType, x: Array) -> Array:
    """The block sums s = f16(d * sum(codes)) of a Q8_1 row, with the unrounded d: (..., n / 32) f32."""
    rows = _check_activation(xp, x, SUPPORTED[Type.Q4_1])
    with np.errstate(all="ignore"):
        codes, scale = _quantize_q8(xp, rows)
        return _half(xp, scale[..., 0] * codes.sum(axis=-1, dtype=xp.int32).astype(xp.float32))


def q8_1_residual(xp: ModuleType, x: Array) -> Array:
    """The correction that a Q4_1 or Q5_1 product of rounded activations needs: (..., n / 32) f32.

    llama.cpp computes the minimums' part as sum_b m[b] * s[b], where s is the float16 number in the Q8_1 block, and not
    as m[b] times the sum of the rounded activations (`ggml_vec_dot_q4_1_q8_1`). So, with W = `dequantize`,
    X = `round_activation(x)`, M = `mins` and this function's result R = s - blocksum(X):  y = X @ W.T + R @ M.T.
    """
    rows = _check_activation(xp, x, SUPPORTED[Type.Q4_1])
    with np.errstate(all="ignore"):
        codes, scale = _quantize_q8(xp, rows)
        total = codes.sum(axis=-1, dtype=xp.int32).astype(xp.float32)  # (..., n_blocks), below 2^12, so the products
        return cast(Array, _half(xp, scale[..., 0] * total) - _half(xp, scale)[..., 0] * total)  # with f16 are exact
