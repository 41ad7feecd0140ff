"""Rotary position embedding (Su et al. 2021), with per-dimension frequency factors and YaRN (Peng et al. 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refengine.array import Array


def rope_angles(
    positions: np.ndarray, rope: Any, freq_factors: np.ndarray | None = None, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines for every position, on the host: two arrays (n_tokens, 1, n_rot / 2).

    rope has n_rot, freq_base, freq_scale, n_ctx_orig, ext_factor, attn_factor, beta_fast and beta_slow.
    θ_i = p · base^(-2i/n_rot) / factor_i. In float32 it is computed by repeated multiplication, as in llama.cpp
    (`ggml_rope_cache_init`); pow would differ by 1e-6 relative. In float64 the formula is used directly.
    YaRN mixes the scaled and the unscaled angle with a ramp over the dimensions, and enlarges the result.
    """
    n_rot = rope.n_rot
    half = n_rot // 2
    position = np.asarray(positions)[:, None]
    if dtype is np.float64:
        theta = position * float(rope.freq_base) ** (-2.0 * np.arange(half) / n_rot)
    else:
        theta_scale = np.float32(float(np.float32(rope.freq_base)) ** float(np.float32(-2.0) / np.float32(n_rot)))
        factors = np.full((len(positions), half), theta_scale, dtype=np.float32)
        factors[:, :1] = position
        theta = np.multiply.accumulate(factors, axis=1)
    one = dtype(1.0)
    scale = dtype(rope.freq_scale)
    extrapolated = theta if freq_factors is None else theta / freq_factors.astype(dtype)
    angle = scale * extrapolated
    magnitude = dtype(rope.attn_factor)
    if rope.ext_factor != 0.0:
        low, high = yarn_corners(n_rot, rope.n_ctx_orig, rope.freq_base, rope.beta_fast, rope.beta_slow)
        ramp = (np.arange(half, dtype=dtype) - dtype(low)) / dtype(max(0.001, high - low))
        mix = (one - np.clip(ramp, 0, 1)) * dtype(rope.ext_factor)
        angle = angle * (one - mix) + extrapolated * mix
        # The file's factor does not include YaRN's magnitude scale, which is applied here.
        magnitude = magnitude * (one + dtype(0.1) * dtype(math.log(max(1.0, 1.0 / rope.freq_scale))))
    # cos and sin of the float32 angle, correctly rounded: NumPy's float32 versions may be off by several ulp.
    wide = angle.astype(np.float64)
    cos = np.cos(wide).astype(dtype) * magnitude
    sin = np.sin(wide).astype(dtype) * magnitude
    return cos[:, None, :], sin[:, None, :]


def yarn_corners(
    n_rot: int, n_ctx_orig: int, freq_base: float, beta_fast: float, beta_slow: float
) -> tuple[float, float]:
    """The dimensions between which YaRN blends: they rotate `beta_fast` and `beta_slow` times within n_ctx_orig."""

    def dimension(turns: float) -> float:
        return n_rot * math.log(n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(freq_base))

    return max(0.0, math.floor(dimension(beta_fast))), min(n_rot - 1.0, math.ceil(dimension(beta_slow)))


def rope_neox(xp: Any, x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs (i, i + n_rot/2). x: (n_tokens, n_head, head_dim); elements from n_rot on are unchanged."""
    half = cos.shape[-1]
    x0, x1, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return xp.concatenate([x0 * cos - x1 * sin, x0 * sin + x1 * cos, rest], axis=-1)


def rope_norm(xp: Any, x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs (2i, 2i + 1). x: (n_tokens, n_head, head_dim); elements from n_rot on are unchanged."""
    n_rot = 2 * cos.shape[-1]
    x0, x1 = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    out = x.copy()
    out[..., 0:n_rot:2] = x0 * cos - x1 * sin
    out[..., 1:n_rot:2] = x0 * sin + x1 * cos
    return out
