"""Selecting experts, softmax over the selected, and adding up, against plain Python."""

import math
from typing import Any

import numpy as np
import pytest

from refengine.ops import Ops, profile
from refengine.ops.moe import row_soft_max, sum_experts, top_experts

OPS = Ops(np, profile("exact"), 0)


def test_top_experts_best_first_ties_to_the_lower() -> None:
    scores = np.array([[1, 5, 3, 5, 2], [7, 7, 7, 7, 7], [-1, -9, -0.5, -2, -3], [0.0, -0.0, 1, -1, 0]], np.float32)
    np.testing.assert_array_equal(top_experts(np, scores, 3), [[1, 3, 2], [0, 1, 2], [2, 0, 3], [2, 0, 1]])
    np.testing.assert_array_equal(top_experts(np, scores, 5)[0], [1, 3, 2, 4, 0])


def test_top_experts_agrees_with_sorting_pairs() -> None:
    scores = np.random.default_rng(5).integers(0, 4, (37, 11)).astype(np.float32)  # many ties
    expected = [[i for _, i in sorted((-float(s), i) for i, s in enumerate(row))][:6] for row in scores]
    np.testing.assert_array_equal(top_experts(np, scores, 6), expected)


def test_take_experts() -> None:
    scores = np.array([[10, 11, 12, 13], [20, 21, 22, 23]], np.float32)
    np.testing.assert_array_equal(OPS.take_experts(scores, np.array([[3, 0], [1, 2]])), [[13, 10], [21, 22]])


# exp (2 to 3 ulp) and two more roundings in float32: 5 × 2^-24; in float64 as few.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 4e-7), (np.float64, 1e-15)])
def test_row_soft_max_is_the_formula(dtype: Any, tolerance: float) -> None:
    x = np.random.default_rng(6).normal(0, 4, (7, 5)).astype(dtype)
    y = row_soft_max(np, x)
    assert y.dtype == dtype
    for row, found in zip(x, y, strict=True):
        total = math.fsum(math.exp(float(v)) for v in row)
        # The argument of exp is a difference of numbers up to 12, rounded: another 12 × 2^-24 in float32.
        np.testing.assert_allclose(found, [math.exp(float(v)) / total for v in row], rtol=8 * tolerance)


def test_row_soft_max_of_large_scores_is_finite() -> None:
    y = row_soft_max(np, np.array([[1e30, 1e30, -1e30]], np.float32))
    np.testing.assert_array_equal(y, [[0.5, 0.5, 0.0]])


def test_sum_experts_adds_in_rank_order() -> None:
    # float32: (1e8 + 1) - 1e8 is 0, in any other order it is 1.
    experts = np.array([[[1e8], [1.0], [-1e8]], [[1e8], [-1e8], [1.0]]], np.float32)
    np.testing.assert_array_equal(sum_experts(experts), [[0.0], [1.0]])
    x = np.random.default_rng(7).normal(size=(3, 1, 5)).astype(np.float32)
    np.testing.assert_array_equal(sum_experts(x), x[:, 0])
