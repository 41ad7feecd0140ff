"""Rows of activations as products take them, against their NumPy twin."""

import numpy as np
import pytest

from refengine.cuda.kernels.norm import norm_bytes
from refengine.cuda.reference import quantize_rows
from refengine.ops.halves import to_halves
from refengine.ops.integers import LARGEST, by_segment, rounded_to_integers, to_integers
from tests.kernels.products import prepared
from tests.kernels.runner import Kernels


def rows_of_all_sizes(n_in: int) -> np.ndarray:
    x = np.random.default_rng(4).standard_normal((9, n_in)).astype(np.float32)
    magnitudes = [1, 1e6, 1e-6, 1e30, 1e-30, 1e-42, 0, 3.4e38, 65504]
    x *= np.array(magnitudes, np.float32)[:, None]
    x[7] = np.clip(x[7], -3.4e38, 3.4e38)
    return x


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("n_in", "warps"), [(96, 1), (768, 3), (800, 2)])
def test_activation_rows_are_their_twins_bit_for_bit(n_in: int, warps: int, halves: bool, activations: Kernels) -> None:
    x = rows_of_all_sizes(n_in)
    for found, expected in zip(prepared(activations, x, warps, halves=halves), quantize_rows(x, halves), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("n_in", "warps"), [(96, 1), (5216, 3)])
def test_a_norm_in_front_has_the_bits_of_its_own_kernel(
    n_in: int, warps: int, halves: bool, activations: Kernels, place: str
) -> None:
    rng, norms, eps = np.random.default_rng(9), Kernels("norm", place), 1e-6
    x, weight = rows_of_all_sizes(n_in), rng.standard_normal(n_in).astype(np.float32)
    x[5, 7] = np.nan
    n_rows = len(x)
    squares, expected = np.empty((n_rows, n_in // 16), np.float32), prepared(activations, x, halves=halves)
    norms.launch("row_squares", (n_rows, -(-n_in // 256)), (256,), [x, squares, n_in])
    outputs = (expected[0], expected[2], expected[1])
    arguments = [x, weight, None, *outputs, np.int32(n_in), np.int32(halves), np.float32(eps)]
    norms.launch("rms_norm_rows", (n_rows,), (256,), arguments, 4 * n_in + norm_bytes(n_in))
    found = prepared(activations, x, warps, halves=halves, squares=squares, norm=weight, eps=eps)
    others = np.arange(n_rows) != 5
    for made, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(made[others], wanted[others])
    if not halves:  # which copy NaN
        assert np.isnan(found[2][5]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_segment_with_nan_or_infinity_has_the_scale_nan(bad: float, activations: Kernels) -> None:
    x = np.ones((2, 512), np.float32)
    x[1, 300] = bad
    _, _, scale = prepared(activations, x)
    np.testing.assert_array_equal(np.isnan(scale), [[False, False], [False, True]])
    assert np.isnan(rounded_to_integers(np, x)[1, 256:]).all()
    assert np.isfinite(rounded_to_integers(np, x)[1, :256]).all()


def test_integers_are_within_half_of_their_last_bit() -> None:
    """And use all of the sixteen bits: the largest of a segment is above a quarter of the largest integer."""
    x = rows_of_all_sizes(512)[:5]
    integers, scale = to_integers(np, x)
    largest = np.abs(integers).max(axis=-1)
    assert (largest <= LARGEST).all()
    assert (largest > LARGEST // 2 - 1).all()
    assert (np.abs(integers * scale.astype(np.float64) - by_segment(np, x)) <= scale / 2).all()
    for top in (32639.4, 32639.49609375, 32639.5, 32640.0, 32768.0, 16384.0):  # around where the power of two changes
        integers, scale = to_integers(np, np.array([[top]], np.float32))
        assert abs(integers[0, 0, 0]) <= LARGEST
        assert integers[0, 0, 0] * scale[0, 0, 0] == np.rint(top / scale[0, 0, 0]) * scale[0, 0, 0]
        assert scale[0, 0, 0] == (1 if top < 32639.5 else 2)


def test_integers_are_nearer_than_halves() -> None:
    """For rows as they are; and never much further, even if one element is far above the others."""
    rng = np.random.default_rng(2)
    for outlier, times in ((0, 0.2), (30, 4), (1000, 4)):
        x = rng.standard_normal((20, 256)).astype(np.float32)
        x[:, 3] += outlier
        halves, exponents = to_halves(np, x)
        of_halves = np.mean((np.ldexp(halves.astype(np.float64), exponents) - x) ** 2)
        of_integers = np.mean((rounded_to_integers(np, x).astype(np.float64) - x) ** 2)
        error = of_integers / np.mean(x.astype(np.float64) ** 2)
        assert of_integers < times * of_halves or error < 2.0**-26, (outlier, of_integers, of_halves, error)


def test_the_order_of_threads_does_not_matter(activations: Kernels) -> None:
    x = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
    first = prepared(activations, x)
    for order in (1, 2, 3):
        for a, b in zip(first, prepared(activations, x, order=order), strict=True):
            np.testing.assert_array_equal(a, b)
