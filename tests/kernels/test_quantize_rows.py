"""Rows of activations as products take them, against their NumPy twin."""

import numpy as np
import pytest

from refengine.cuda.layout import activation_order
from refengine.cuda.reference import block_sums, quantize_rows
from tests.kernels.products import prepared
from tests.kernels.runner import Kernels

EPS = 2.0**-24  # float32, half a unit in the last place
HALF = 2.0**-11  # float16, the same


@pytest.fixture(scope="module")
def activations(place: str) -> Kernels:
    return Kernels("quantize_rows", place)


@pytest.mark.parametrize("warps", [1, 3])
def test_activation_rows_are_their_twins_bit_for_bit(warps: int, activations: Kernels) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((9, 96)).astype(np.float32)
    magnitudes = [1, 1e6, 1e-6, 1e30, 1e-30, 1e-42, 0, 3.4e38, 65504]
    x *= np.array(magnitudes, np.float32)[:, None]
    x[7] = np.clip(x[7], -3.4e38, 3.4e38)
    halves, sums, scale = prepared(activations, x, warps)
    assert not halves[:, 96:].any()
    assert not sums[:, 3:].any()
    halves, sums = np.ascontiguousarray(halves[:, :96]), np.ascontiguousarray(sums[:, :3])
    expected, expected_scale = quantize_rows(x)
    np.testing.assert_array_equal(halves.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(scale, expected_scale)
    # 31 additions of float32, in a tree of five: each level rounds once. Two halves hold it to 2^-22 of itself, and to
    # half of their smallest number, 2^-25.
    bound = (5 * EPS + 2.0**-22) * np.abs(expected.astype(np.float64)).reshape(9, -1, 32).sum(axis=-1) + 32 * 2.0**-25
    parts = sums.view(np.float16).astype(np.float64).reshape(9, -1, 2)
    assert (np.abs(32 * parts.sum(axis=-1) - block_sums(expected)) <= bound).all()
    back = np.empty_like(x)
    back[:, activation_order(96)] = halves.astype(np.float64) * scale[:, None]
    usable = np.abs(x) > 2.0**-28 * np.abs(x).max(axis=1, keepdims=True)
    normal = usable & (np.abs(x) > 1e-37)
    assert (np.abs(back - x)[normal] <= HALF * np.abs(x)[normal]).all()


def test_the_order_of_threads_does_not_matter(activations: Kernels) -> None:
    x = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
    first = prepared(activations, x)
    for order in (1, 2, 3):
        for a, b in zip(first, prepared(activations, x, order=order), strict=True):
            np.testing.assert_array_equal(a, b)
