"""Feed-forward activations."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from refengine.array import Array

GELU_COEFFICIENT = 0.044715
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def swiglu(xp: Any, gate: Array, up: Array) -> Array:
    """silu(gate) · up with silu(x) = x / (1 + e^-x) (Shazeer 2020). Both (..., n_ff)."""
    return gate / (1 + xp.exp(-gate)) * up


def swiglu_clamped(xp: Any, gate: Array, up: Array, alpha: float = 1.702, limit: float = 7.0) -> Array:
    """gpt-oss: g = min(gate, limit), u = clip(up, ±limit); g / (1 + e^(-alpha·g)) · (u + 1). Both (..., n_ff)."""
    g = xp.minimum(gate, gate.dtype.type(limit))
    u = xp.clip(up, -limit, limit)
    return g / (1 + xp.exp(-gate.dtype.type(alpha) * g)) * (u + 1)


def gelu(xp: Any, x: Array) -> Array:
    """tanh GELU (Hendrycks & Gimpel 2016): x/2 · (1 + tanh(√(2/π) · x · (1 + 0.044715 x²)))."""
    c = x.dtype.type
    return c(0.5) * x * (1 + xp.tanh(c(SQRT_2_OVER_PI) * x * (1 + c(GELU_COEFFICIENT) * x * x)))


def gelu_f16_table(xp: Any, x: Array) -> Array:
    """GELU by llama.cpp's CPU table: argument and result are rounded to float16; 0 up to -10, x itself from 10 on."""
    codes = x.astype(xp.float16).view(xp.uint16)
    looked_up = xp.asarray(_gelu_table())[codes].astype(x.dtype)
    return xp.where(x <= -10, x.dtype.type(0), xp.where(x >= 10, x, looked_up))


@cache
def _gelu_table() -> np.ndarray:
    """The GELU of all 65,536 float16 numbers, (65536,) float16, equal to ggml's table in every finite entry.

    ggml computes it in float32 with a correctly rounded tanh and, if built with FMA, one rounding in 1 + (0.044715 x)
    x.
    """
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        scaled = (np.float32(GELU_COEFFICIENT) * x).astype(np.float64)
        argument = np.float32(SQRT_2_OVER_PI) * x * (1 + scaled * x).astype(np.float32)
        tanh = np.tanh(argument.astype(np.float64)).astype(np.float32)
        return (np.float32(0.5) * x * (1 + tanh)).astype(np.float16)
