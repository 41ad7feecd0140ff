"""Normalisation over the last axis. Sums are in float64, as in llama.cpp's CPU backend (`ggml_float`)."""

from __future__ import annotations

from typing import Any

from refengine.array import Array


def rms_norm(xp: Any, x: Array, weight: Array, eps: float) -> Array:
    """y = x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019).

    x: (..., n) float; weight: (n,) float32; returns (..., n) in x's dtype.
    """
    mean_square = xp.mean(xp.square(x), axis=-1, keepdims=True, dtype=xp.float64)
    scale = (1.0 / xp.sqrt(mean_square.astype(x.dtype) + x.dtype.type(eps))).astype(x.dtype)
    return x * scale * weight.astype(x.dtype, copy=False)


def layer_norm(xp: Any, x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """y = (x - mean) / sqrt(var + eps) · weight + bias, var with divisor n (Ba et al. 2016).

    x: (..., n) float; weight, bias: (n,) float32; returns (..., n) in x's dtype.
    """
    centred = x - xp.mean(x, axis=-1, keepdims=True, dtype=xp.float64).astype(x.dtype)
    variance = xp.mean(xp.square(centred), axis=-1, keepdims=True, dtype=xp.float64)
    scale = (1.0 / xp.sqrt(variance.astype(x.dtype) + x.dtype.type(eps))).astype(x.dtype)
    return centred * scale * weight.astype(x.dtype, copy=False) + bias.astype(x.dtype, copy=False)
