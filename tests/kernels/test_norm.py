"""Norms over rows, against their NumPy twins."""

from typing import Any

import numpy as np
import pytest

from refengine.cuda.kernels.norm import norm_bytes
from refengine.ops import norm
from tests.kernels.runner import Kernels

EPS = 2.0**-24  # float32, half a unit in the last place


@pytest.fixture(scope="module")
def norms(place: str) -> Kernels:
    return Kernels("norm", place)


def rows(n: int, seed: int = 1) -> np.ndarray:
    """Rows of very different size, and one of zeros."""
    x = np.random.default_rng(seed).standard_normal((6, n)).astype(np.float32) + np.float32(0.3)
    return x * np.array([1, 1e6, 1e-6, 30, 0, 1e15], np.float32)[:, None]


def run_norm(
    norms: Kernels, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float, order: int = 0
) -> Any:
    y = np.full_like(x, np.nan)
    given = [x, weight, y] if bias is None else [x, weight, bias, y]
    kernel = "rms_norm_f32" if bias is None else "layer_norm_f32"
    sizes = [np.int32(x.shape[1]), np.float32(eps)]
    norms.launch(kernel, (len(x),), (256,), [*given, *sizes], norm_bytes(x.shape[1]), order=order)
    return y


@pytest.mark.parametrize("n", [32, 96, 896, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_norms_are_within_float32_of_float64(n: int, with_bias: bool, norms: Kernels) -> None:
    rng = np.random.default_rng(2)
    x, weight = rows(n), rng.standard_normal(n).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if with_bias else None
    y = run_norm(norms, x, weight, bias, 1e-5)
    wide, w = x.astype(np.float64), weight.astype(np.float64)
    if bias is None:
        expected = norm.rms_norm(np, wide, w, 1e-5)
        magnitude = np.abs(expected)
    else:
        expected = norm.layer_norm(np, wide, w, bias.astype(np.float64), 1e-5)
        # The mean is taken off: what cancels there is as large as the row.
        spread = np.sqrt(wide.var(axis=1, keepdims=True) + 1e-5)
        magnitude = (np.abs(wide) + np.abs(wide.mean(axis=1, keepdims=True))) / spread * np.abs(w) + np.abs(bias)
    # A sum of n/256 terms a thread, then 5 levels and 8 warps; root, quotient and products round once each.
    assert (np.abs(y - expected) <= (n / 256 + 24) * EPS * magnitude).all()


def test_a_row_does_not_know_its_neighbours_nor_the_order_of_threads(norms: Kernels) -> None:
    x, weight = rows(300), np.ones(300, np.float32)
    whole = run_norm(norms, x, weight, None, 1e-6)
    for i in range(len(x)):
        np.testing.assert_array_equal(run_norm(norms, x[i : i + 1], weight, None, 1e-6, order=i), whole[i : i + 1])
    bad = x.copy()
    bad[2, 17] = np.nan
    spoilt = run_norm(norms, bad, weight, None, 1e-6)
    assert np.isnan(spoilt[2]).all()
    np.testing.assert_array_equal(np.delete(spoilt, 2, 0), np.delete(whole, 2, 0))
