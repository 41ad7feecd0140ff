"""Activations against their formulas in Python floats."""

import math
from typing import Any

import numpy as np
import pytest

from refengine.ops.activation import gelu, gelu_f16_table, swiglu, swiglu_clamped

# exp or tanh (2 to 3 ulp in NumPy's float32) and about five more roundings: 8 × 2^-24, rounded up.
FLOAT32 = 5e-7
# As above in float64.
FLOAT64 = 1e-15
TOLERANCE = [(np.float32, FLOAT32), (np.float64, FLOAT64)]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu_reference(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gates(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two (3, 11) arrays that reach past the clamps at ±7."""
    rng = np.random.default_rng(2)
    return (rng.normal(0, 5, (3, 11)).astype(dtype), rng.normal(0, 5, (3, 11)).astype(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
def test_swiglu_is_the_formula(dtype: Any, tolerance: float) -> None:
    gate, up = gates(dtype)
    expected = [[silu(float(g)) * float(u) for g, u in zip(*rows, strict=True)] for rows in zip(gate, up, strict=True)]
    y = swiglu(np, gate, up)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=tolerance)
    assert not np.allclose(swiglu(np, up, gate), expected, rtol=1e-2), "control: gate and up are not exchangeable"


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
def test_clamped_swiglu_is_the_formula(dtype: Any, tolerance: float) -> None:
    gate, up = gates(dtype)
    assert (gate > 7).any()
    assert (gate < -7).any()
    assert (np.abs(up) > 7).any()

    def reference(gate: float, up: float) -> float:
        g, u = min(gate, 7.0), max(-7.0, min(up, 7.0))  # the gate is clamped from above only
        return g / (1 + math.exp(-1.702 * g)) * (u + 1)

    y = swiglu_clamped(np, gate, up)
    assert y.dtype == dtype
    expected = np.vectorize(reference)(gate.astype(np.float64), up.astype(np.float64))
    # u + 1 may cancel: absolute, against values up to 7 × 8. exp(-1.702 g) multiplies the rounding of its argument by
    # up to 1.702 × 15.
    np.testing.assert_allclose(y, expected, rtol=20 * tolerance, atol=8 * tolerance)
    both_sides = np.clip(gate, -7, 7)  # control
    assert not np.allclose(
        both_sides / (1 + np.exp(-1.702 * both_sides)) * (np.clip(up, -7, 7) + 1), expected, rtol=1e-3
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
def test_gelu_is_the_formula(dtype: Any, tolerance: float) -> None:
    x = np.linspace(-4, 4, 77).astype(dtype)
    y = gelu(np, x)
    assert y.dtype == dtype
    # Absolute: 1 + tanh cancels on the left, where the result is small.
    np.testing.assert_allclose(y, [gelu_reference(float(v)) for v in x], rtol=tolerance, atol=4 * tolerance)
    exact = [0.5 * float(v) * (1 + math.erf(float(v) / math.sqrt(2))) for v in x]
    assert not np.allclose(y, exact, rtol=0, atol=1e-4), "control: the error-function GELU is another"


def test_gelu_table_rounds_argument_and_result_to_float16() -> None:
    x = np.clip(np.random.default_rng(4).normal(0, 3, 5000), -9.9, 9.9).astype(np.float32)
    y = gelu_f16_table(np, x)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, y.astype(np.float16))
    np.testing.assert_array_equal(y, gelu_f16_table(np, x.astype(np.float16).astype(np.float32)))
    expected = np.array([gelu_reference(float(np.float16(v))) for v in x])
    # Half a float16 ulp, plus what float32 loses where 1 + tanh cancels (x × 2^-25), rounded up.
    np.testing.assert_allclose(y, expected, rtol=2.0**-11 * 1.01, atol=4e-7)
    unrounded = np.array([gelu_reference(float(v)) for v in x])
    assert not np.allclose(y, unrounded, rtol=2.0**-11 * 1.01, atol=4e-7), "control: the argument is rounded too"


def test_gelu_table_ends() -> None:
    # ggml_vec_gelu_f32: 0 up to -10, x itself from 10 on, not rounded.
    x = np.array([-np.inf, -1e30, -10.0, 10.0, 10.003, 1e30, np.inf], np.float32)
    with np.errstate(over="ignore"):  # as around every forward pass
        y = gelu_f16_table(np, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 10.0, np.float32(10.003), np.float32(1e30), np.inf])
    assert np.isnan(gelu_f16_table(np, np.array([np.nan], np.float32))).all()
