"""Metrics against hand-made cases and against their textbook formulas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.validate.metrics import compare, compare_logits, ulp_distance


def test_a_hand_made_pair() -> None:
    reference = np.array([[1.0, 2.0], [0.0, -4.0]])
    value = np.array([[1.0, 2.5], [0.25, -4.0]])
    found = compare(value, reference)
    assert found.nmse == pytest.approx((0.25 + 0.0625) / 21, rel=1e-15)
    assert found.cosine == pytest.approx((1 + 5 + 16) / math.sqrt(21 * (1 + 6.25 + 0.0625 + 16)), rel=1e-15)
    assert (found.max_abs, found.mean_abs) == (0.5, 0.1875)
    assert (found.max_rel, found.mean_rel) == (0.25, 0.25 / 3)  # the zero has no relative error
    assert (found.worst, found.worst_value, found.worst_reference) == ((0, 1), 2.5, 2.0)
    assert found.finite


def test_equal_tensors_are_at_no_distance() -> None:
    value = np.array([0.0, -0.0, 3.5, np.inf, -np.inf, np.nan], np.float32)
    found = compare(value, value.copy())
    assert (found.nmse, found.cosine, found.max_abs, found.ulp_max, found.nonfinite_mismatches) == (0, 1, 0, 0, 0)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_in_one_only_is_a_mismatch_and_spoils_nothing_else(odd: float) -> None:
    reference = np.array([1.0, 2.0, 4.0])
    for value, other in ((np.array([1.0, odd, 4.5]), reference), (reference, np.array([1.0, odd, 4.5]))):
        found = compare(value, other)
        assert (found.nonfinite_mismatches, found.worst) == (1, (1,))
        assert found.max_abs == 0.5
    assert compare(np.array([np.inf]), np.array([-np.inf])).nonfinite_mismatches == 1
    assert compare(np.array([np.nan]), np.array([np.inf])).nonfinite_mismatches == 1


def test_zero_references() -> None:
    zero = np.zeros(3)
    assert compare(zero, zero).nmse == 0
    assert compare(zero, zero).cosine == 1
    assert compare(np.array([0, 0, 1e-9]), zero).nmse == math.inf
    assert compare(np.array([0, 0, 1e-9]), zero).cosine == 0


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_figures_do_not_depend_on_the_scale(scale: float) -> None:
    reference, noise = np.random.default_rng(0).standard_normal((2, 50))
    found = compare((reference + 0.01 * noise) * scale, reference * scale)
    assert found.nmse == pytest.approx(1e-4 * np.mean(noise**2) / np.mean(reference**2), rel=1e-9)
    assert 0.999 < found.cosine < 1


@pytest.mark.parametrize(
    ("x", "y", "distance"),
    [
        (1.0, 1.0 + 2**-23, 1),
        (1.0, 1.0 - 2**-24, 1),
        (0.0, -0.0, 0),
        (2**-149, -(2**-149), 2),
        (1.0, 2.0, 1 << 23),
        (1.0, 1.0 + 2**-40, 0),  # one float32 number
    ],
)
def test_ulp_distance_counts_float32_numbers(x: float, y: float, distance: int) -> None:
    assert ulp_distance(np.array([x]), np.array([y])).tolist() == [distance]


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.floats(-(2.0**127), 2.0**127, width=32), st.integers(1, 50))
def test_ulp_distance_of_stepping_away(start: float, steps: int) -> None:
    end = np.float32(start)
    for _ in range(steps):
        end = np.nextafter(end, np.float32(np.inf))
    assert ulp_distance(np.array([start]), np.array([float(end)])).tolist() == [steps]


def test_shapes_must_agree_and_hold_something() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(np.zeros((0, 3)), np.zeros((0, 3)))


def test_logits_against_the_textbook() -> None:
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((7, 30)) * 3
    value = reference + rng.standard_normal((7, 30))
    ids = rng.integers(0, 30, 7).tolist()
    found = compare_logits(value, reference, ids)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (reference, value))
    np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(axis=1), rtol=1e-12)
    next_p, next_q = (x[np.arange(6), ids[1:]] for x in (p, q))
    assert found.perplexity_ratio == pytest.approx(
        math.exp(-np.log(next_q).mean()) / math.exp(-np.log(next_p).mean()), rel=1e-12
    )
    last = p[-1].argmax()
    delta = np.append(next_q - next_p, q[-1, last] - p[-1, last])
    assert found.delta_p_max == pytest.approx(np.abs(delta).max(), rel=1e-12)
    assert found.delta_p_rms == pytest.approx(math.sqrt((delta**2).mean()), rel=1e-12)
    assert found.top1_agreement == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    shared = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10 for a, b in zip(p, q, strict=True)]
    assert found.topk_overlap == pytest.approx(np.mean(shared))
    assert found.kl_max == max(found.kl)
    assert found.kl_mean <= found.kl_p99 <= found.kl_max


def test_a_tie_is_called_a_tie() -> None:
    reference = np.array([[1.0, 0.999, 0.0], [5.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    value = np.array([[1.0, 1.001, 0.0], [1.0, 5.0, 0.0], [2.0, 0.0, 0.0]])
    near, far = compare_logits(value, reference, bounds=np.full(3, 0.002)).flips
    assert (near.position, near.token, near.reference_token) == (0, 1, 0)
    assert near.margin == pytest.approx(0.001)
    assert near.is_tie
    assert (far.position, far.margin, far.is_tie) == (1, 4.0, False)
    assert not any(f.is_tie for f in compare_logits(value, reference).flips)


def test_logits_of_masked_tokens() -> None:
    """Minus infinity is a token that cannot be: without weight in the reference, endless KL where only ours has it."""
    masked = np.array([[1.0, 2.0, -np.inf]])
    assert compare_logits(np.array([[1.0, 2.0, -50.0]]), masked).kl_max == pytest.approx(0, abs=1e-15)
    assert compare_logits(masked, np.array([[1.0, 2.0, 0.0]])).kl_max == math.inf


def test_logits_must_be_of_one_shape() -> None:
    with pytest.raises(ValueError, match="two equal"):
        compare_logits(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="3 ids for 2 positions"):
        compare_logits(np.zeros((2, 3)), np.zeros((2, 3)), [1, 2, 3])
