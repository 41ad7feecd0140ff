"""Rotary embedding: angles against the formulas and against llama.cpp's float32 recurrence, rotation against complex
numbers, and the property it exists for."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refengine.config import RopeConfig
from refengine.ops import Ops, profile
from refengine.ops.rope import rope_angles, rope_neox, rope_norm, yarn_corners

PLAIN = RopeConfig(n_rot=10, freq_base=500.0, freq_scale=1.0, n_ctx_orig=64, ext_factor=0.0, attn_factor=1.0)
YARN = replace(PLAIN, n_rot=22, freq_base=10000.0, freq_scale=1 / 8, ext_factor=1.0, n_ctx_orig=4096)
POSITIONS = np.array([0, 1, 2, 17, 63, 300])
# cos, sin and a few products in float64.
FLOAT64 = 1e-13


def angles64(
    positions: np.ndarray, rope: RopeConfig, factors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rope_angles(positions, rope, factors, np.float64)
    assert cos.dtype == sin.dtype == np.float64
    assert cos.shape == sin.shape == (len(positions), 1, rope.n_rot // 2)
    return cos[:, 0], sin[:, 0]


def reference_angle(p: int, i: int, rope: RopeConfig, factor: float = 1.0) -> tuple[float, float]:
    """(angle, magnitude) of pair `i` at position `p`: Su et al. 2021, and with ext_factor Peng et al. 2023."""
    unscaled = p / factor * rope.freq_base ** (-2 * i / rope.n_rot)
    scaled = unscaled * rope.freq_scale
    if rope.ext_factor == 0:
        return scaled, rope.attn_factor

    def dimension(turns: float) -> float:  # the pair that makes this many turns within the original context
        return rope.n_rot * math.log(rope.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(rope.freq_base))

    low = max(0, math.floor(dimension(rope.beta_fast)))
    high = min(rope.n_rot - 1, math.ceil(dimension(rope.beta_slow)))
    keep = rope.ext_factor * (1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low))))
    growth = 1 + 0.1 * math.log(1 / rope.freq_scale) if rope.freq_scale < 1 else 1.0
    return scaled * (1 - keep) + unscaled * keep, rope.attn_factor * growth


VARIANTS = {
    "plain": PLAIN,
    "linear": replace(PLAIN, freq_scale=0.25, attn_factor=1.19),
    "yarn": YARN,
    "yarn-attention": replace(YARN, attn_factor=0.7),
    "yarn-narrow": replace(YARN, n_ctx_orig=8, freq_scale=1 / 32),  # corners at the first dimension
    "yarn-shrinking": replace(YARN, freq_scale=2.0),  # llama_context: no growth for factors below 1
}


@pytest.mark.parametrize("rope", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("with_factors", [False, True])
def test_angles_are_the_formula_in_float64(rope: RopeConfig, with_factors: bool) -> None:
    factors = np.linspace(1, 9, rope.n_rot // 2).astype(np.float32) if with_factors else None
    cos, sin = angles64(POSITIONS, rope, factors)
    for row, p in enumerate(POSITIONS):
        for i in range(rope.n_rot // 2):
            angle, magnitude = reference_angle(int(p), i, rope, 1.0 if factors is None else float(factors[i]))
            assert cos[row, i] == pytest.approx(math.cos(angle) * magnitude, abs=300 * FLOAT64)
            assert sin[row, i] == pytest.approx(math.sin(angle) * magnitude, abs=300 * FLOAT64)


def test_variants_differ() -> None:
    """The test above would not see a parameter that is ignored if two variants were the same."""
    same_size = [v for v in VARIANTS.values() if v.n_rot == 22]
    tables = [angles64(POSITIONS, v)[0] for v in same_size]
    for i, a in enumerate(tables):
        for b in tables[i + 1 :]:
            assert np.abs(a - b).max() > 1e-3


def test_float32_angles_are_llamacpps_recurrence() -> None:
    # ggml_rope_cache_init: theta = p, then theta *= theta_scale for every pair, all in float32.
    rope = replace(PLAIN, n_rot=34, freq_base=10000.0)
    cos, sin = rope_angles(POSITIONS, rope)
    assert cos.dtype == np.float32
    theta_scale = np.float32(math.pow(10000.0, float(np.float32(-2.0 / 34))))
    by_power_differs = False
    for row, p in enumerate(POSITIONS):
        theta = np.float32(p)
        for i in range(17):
            assert cos[row, 0, i] == np.float32(math.cos(theta))
            assert sin[row, 0, i] == np.float32(math.sin(theta))
            by_power_differs |= bool(theta != np.float32(float(p) * 10000.0 ** (-2 * i / 34)))
            theta = np.float32(theta * theta_scale)
    assert by_power_differs, "control: the formula itself gives other bits"


@pytest.mark.parametrize("rope", VARIANTS.values(), ids=VARIANTS)
def test_float32_angles_are_near_the_formula(rope: RopeConfig) -> None:
    cos, sin = rope_angles(POSITIONS, rope)
    cos64, sin64 = angles64(POSITIONS, rope)
    # The angle is up to 300 × 2 and has gone through up to n_rot / 2 = 11 products, theta_scale's own rounding with
    # each: 2 × 11 × 2^-24 relative; YaRN's mixing adds as much again. Times the magnitude, at most 1.4.
    tolerance = 600 * 1.4 * 4 * 11 * 2.0**-24
    np.testing.assert_allclose(cos[:, 0], cos64, rtol=0, atol=tolerance)
    np.testing.assert_allclose(sin[:, 0], sin64, rtol=0, atol=tolerance)


def test_yarn_corners() -> None:
    # GPT-OSS: base 150000, heads of 64, original context 4096: pairs 8 to 18 are blended (64/2·ln(4096/(32·2π))/ln base
    # = 8.08, and 17.39 for one turn).
    assert yarn_corners(64, 4096, 150000.0, 32.0, 1.0) == (8, 18)
    assert yarn_corners(10, 4, 10000.0, 32.0, 1.0)[0] == 0
    assert yarn_corners(10, 1 << 30, 1.5, 32.0, 1.0)[1] == 9


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Each pair as a complex number, times cos + i sin."""
    out = x.astype(np.float64).copy()
    for t, h in np.ndindex(x.shape[:2]):
        for i, (a, b) in enumerate(pairs):
            z = complex(x[t, h, a], x[t, h, b]) * complex(cos[t, 0, i], sin[t, 0, i])
            out[t, h, a], out[t, h, b] = z.real, z.imag
    return out


# A difference of two products in float32, each rounded, of numbers up to 4: 3 × 4 × 2^-24, rounded up.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize("n_rot", [10, 6])
def test_rotation_pairs(dtype: Any, tolerance: float, n_rot: int) -> None:
    rng = np.random.default_rng(9)
    x = rng.normal(size=(5, 3, 10)).astype(dtype)
    angle = rng.uniform(-3, 3, (5, 1, n_rot // 2))
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    before = x.copy()
    neox, norm = rope_neox(np, x, cos, sin), rope_norm(np, x, cos, sin)
    half = n_rot // 2
    np.testing.assert_allclose(neox, rotated(x, cos, sin, [(i, i + half) for i in range(half)]), rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        norm, rotated(x, cos, sin, [(2 * i, 2 * i + 1) for i in range(half)]), rtol=0, atol=tolerance
    )
    assert not np.allclose(neox, norm, atol=1e-2), "control: the two pairings differ"
    np.testing.assert_array_equal(neox[..., n_rot:], x[..., n_rot:])
    np.testing.assert_array_equal(norm[..., n_rot:], x[..., n_rot:])
    assert neox.dtype == norm.dtype == dtype
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("rotate", [rope_neox, rope_norm])
def test_products_depend_on_the_distance_only(rotate: object) -> None:
    assert callable(rotate)
    rng = np.random.default_rng(10)
    q, k = rng.normal(size=(2, 1, 1, 10))
    products = []
    for p in (0, 5, 211):
        cos, sin = rope_angles(np.array([p, p + 7]), PLAIN, None, np.float64)
        products.append(float((rotate(np, q, cos[1:], sin[1:]) * rotate(np, k, cos[:1], sin[:1])).sum()))
    assert products == pytest.approx([products[0]] * 3, rel=1e-11)  # angles of 200 lose three digits of 16
    cos, sin = rope_angles(np.array([0, 8]), PLAIN, None, np.float64)
    assert abs(float((rotate(np, q, cos[1:], sin[1:]) * rotate(np, k, cos[:1], sin[:1])).sum()) - products[0]) > 1e-3


def test_ops_hands_the_profiles_type_on() -> None:
    for name, dtype in (("exact", np.float32), ("llamacpp", np.float32), ("exact64", np.float64)):
        cos, sin = Ops(np, profile(name), 0).rope_angles(POSITIONS, PLAIN)
        assert cos.dtype == sin.dtype == dtype
