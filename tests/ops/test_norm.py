"""RMSNorm and LayerNorm against the formulas, one element at a time in float64."""

import math
from typing import Any

import numpy as np
import pytest

from refengine.ops.norm import layer_norm, rms_norm

# A float32 result passes through about five roundings (square, scale, two products, sum): 5 × 2^-24, rounded up.
FLOAT32 = 4e-7
# The same in float64, with some room for the order of a sum of 13 terms.
FLOAT64 = 1e-15
TOLERANCE = [(np.float32, FLOAT32), (np.float64, FLOAT64)]

Array = np.ndarray


def rms_norm_reference(x: Array, weight: Array, eps: float) -> Array:
    out = np.empty(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        mean_square = math.fsum(float(v) ** 2 for v in x[row]) / x.shape[-1]
        for i, v in enumerate(x[row]):
            out[(*row, i)] = float(v) / math.sqrt(mean_square + eps) * float(weight[i])
    return out


def layer_norm_reference(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    out = np.empty(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        values = [float(v) for v in x[row]]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for i, v in enumerate(values):
            out[(*row, i)] = (v - mean) / math.sqrt(variance + eps) * float(weight[i]) + float(bias[i])
    return out


def inputs(dtype: Any) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(1)
    x = rng.normal(0.3, 1.7, size=(5, 3, 13)).astype(dtype)
    return x, rng.normal(1, 0.4, size=13).astype(np.float32), rng.normal(size=13).astype(np.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("eps", [1e-5, 0.25])
def test_rms_norm_is_the_formula(dtype: Any, tolerance: float, eps: float) -> None:
    x, weight, _ = inputs(dtype)
    y = rms_norm(np, x, weight, eps)
    expected = rms_norm_reference(x, weight, eps)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=tolerance)
    # Control: epsilon outside the root is another function.
    outside = x / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps) * weight
    assert not np.allclose(outside, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("eps", [1e-5, 0.25])
def test_layer_norm_is_the_formula(dtype: Any, tolerance: float, eps: float) -> None:
    x, weight, bias = inputs(dtype)
    y = layer_norm(np, x, weight, bias, eps)
    expected = layer_norm_reference(x, weight, bias, eps)
    assert y.dtype == dtype
    # Absolute: the last addition may cancel; the terms are of order 1 to 5.
    np.testing.assert_allclose(y, expected, rtol=0, atol=5 * tolerance)
    # Control: the sample variance (divisor n - 1) is another function.
    sample = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + eps) * weight + bias
    assert not np.allclose(sample, expected, rtol=0, atol=5 * tolerance)


def test_zeros_stay_finite() -> None:
    zeros, weight, bias = np.zeros((2, 7), np.float32), np.full(7, 3, np.float32), np.full(7, 2, np.float32)
    np.testing.assert_array_equal(rms_norm(np, zeros, weight, 1e-6), zeros)
    np.testing.assert_array_equal(layer_norm(np, zeros, weight, bias, 1e-6), np.full((2, 7), 2, np.float32))


def test_sums_do_not_run_in_float32() -> None:
    # 1 + 4096 · 2^-26: added to 1 one after another, or in groups behind it, float32 loses most of the small squares.
    n = 4097
    x = np.full((1, n), 2.0**-13, np.float32)
    x[0, 0] = 1.0
    mean_square = (1 + (n - 1) * 2.0**-26) / n
    y = rms_norm(np, x, np.ones(n, np.float32), 0.0)
    np.testing.assert_allclose(y[0, 0], 1 / math.sqrt(mean_square), rtol=1.5 * 2.0**-24)
    running = np.add.accumulate(np.square(x[0]))[-1]  # control: what a float32 running sum makes of it
    assert abs(running / n / mean_square - 1) > 50 * 2.0**-24


def test_every_row_is_its_own() -> None:
    x, weight, bias = inputs(np.float32)
    np.testing.assert_array_equal(rms_norm(np, x[2:3], weight, 1e-5), rms_norm(np, x, weight, 1e-5)[2:3])
    np.testing.assert_array_equal(
        layer_norm(np, x[2:3], weight, bias, 1e-5), layer_norm(np, x, weight, bias, 1e-5)[2:3]
    )
