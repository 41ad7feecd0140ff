"""Rounding of activations: properties and hand-computed values. The comparison with ggml is in test_quants_ggml.py."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.errors import ModelError
from refengine.quants import SUPPORTED, q8_1_residual, q8_1_sums, quantize_activation, round_activation

T = GGMLQuantizationType
BLOCKED = [t for t, f in SUPPORTED.items() if f.partner.startswith("Q8")]


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, n)).astype(np.float32)


def test_round_activation_f32_is_the_same_array() -> None:
    x = rows(7)
    assert round_activation(np, x, T.F32) is x


@pytest.mark.parametrize("type_", [T.F16, T.BF16], ids=lambda t: t.name)
def test_round_activation_half_ties_go_to_even(type_: T) -> None:
    ulp = 2.0**-10 if type_ == T.F16 else 2.0**-7
    x = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.49 * ulp, -1 - ulp / 2], np.float32)
    assert round_activation(np, x, type_).tolist() == [1.0, 1 + 2 * ulp, 1.0, -1.0]


def test_round_activation_bf16_keeps_infinities_and_nan() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3.4e38, 1e-40], np.float32)
    got = round_activation(np, x, T.BF16)
    assert got[:2].tolist() == [np.inf, -np.inf]
    assert np.isnan(got[2])
    assert got[3] == np.inf  # above the largest bfloat16 by more than half a unit
    assert 0 < got[4] < 2e-40


def test_round_activation_q8_0_by_hand() -> None:
    # largest magnitude 127 makes the scale exactly 1: codes are the values to nearest, ties to even
    x = np.zeros(32, np.float32)
    x[:6] = [-127, 0.5, 1.5, 2.5, -2.5, 126.4]
    assert round_activation(np, x, T.Q8_0)[:6].tolist() == [-127, 0, 2, 2, -2, 126]


def test_round_activation_q8_k_by_hand() -> None:
    # the first element of largest magnitude becomes -127 and its sign moves into the scale
    x = np.zeros(256, np.float32)
    x[:5] = [1.0, 254.0, -254.0, 3.0, -5.0]
    codes, scale = quantize_activation(np, x, T.Q6_K)
    assert scale.item() == -2.0
    assert codes[0, :5].tolist() == [0, -127, 127, -2, 2]  # 1 and 3 are ties at 0.5 and 1.5, -5 at 2.5: to even
    assert round_activation(np, x, T.Q6_K)[:5].tolist() == [0.0, 254.0, -254.0, 4.0, -4.0]


@pytest.mark.parametrize("type_", BLOCKED, ids=lambda t: t.name)
def test_round_activation_error_is_below_one_step(type_: T) -> None:
    block = 256 if SUPPORTED[type_].partner == "Q8_K" else 32
    x = rows(512)
    step = np.abs(x).reshape(3, -1, block).max(-1).repeat(block, axis=-1) / 127
    error = np.abs(round_activation(np, x, type_) - x)
    # half a step of rounding, and up to 127 codes of a scale rounded to float16 (2^-11 relative)
    assert (error <= step * (0.5001 + 127 * 2**-11)).all()
    assert error.max() > 0.4 * step.min()  # it does round


@pytest.mark.parametrize("type_", BLOCKED, ids=lambda t: t.name)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-38, 1e-42])
def test_round_activation_of_vanishing_rows_is_zero_or_close(type_: T, value: float) -> None:
    x = np.full((2, 256), value, np.float32)
    x[:, ::2] *= -1
    got = round_activation(np, x, type_)
    if SUPPORTED[type_].partner == "Q8_K" and value == 1e-30:
        np.testing.assert_allclose(got, x, rtol=1e-6)  # its scale stays float32
    else:
        assert (got == 0).all()


@pytest.mark.parametrize("type_", BLOCKED, ids=lambda t: t.name)
def test_round_activation_keeps_nan_visible_in_its_block_only(type_: T) -> None:
    block = 256 if SUPPORTED[type_].partner == "Q8_K" else 32
    x = rows(512)
    x[1, 5] = np.nan
    bad = np.isnan(round_activation(np, x, type_))
    assert bad[1, :block].all()
    assert bad.sum() == block


@pytest.mark.parametrize("type_", BLOCKED, ids=lambda t: t.name)
def test_quantize_activation_times_scale_is_round_activation(type_: T) -> None:
    x = rows(512).reshape(3, 1, 512)
    codes, scale = quantize_activation(np, x, type_)
    assert codes.dtype == np.int8
    assert codes.shape == (3, 1, *((2, 256) if SUPPORTED[type_].partner == "Q8_K" else (16, 32)))
    np.testing.assert_array_equal((codes * scale).reshape(x.shape), round_activation(np, x, type_))


def test_round_activation_takes_strided_input_and_leaves_it_alone() -> None:
    x = rows(512)
    before = x.copy()
    np.testing.assert_array_equal(round_activation(np, x[:, :256], T.Q4_K), round_activation(np, x, T.Q4_K)[:, :256])
    np.testing.assert_array_equal(x, before)


def test_q8_1_sums_by_hand() -> None:
    # codes 127 and 31 times 1; d = 1 + 2^-12 is 1 as float16, but the sum is taken with d before that rounding
    d = 1 + 2**-12
    x = np.full(32, d, np.float32)
    x[0] = 127 * d
    # 158 * (1 + 2^-12) = 158.0386 rounds to a multiple of 2^-3
    assert q8_1_sums(np, x).tolist() == [158.0]
    x[1:] = 127 * d
    assert q8_1_sums(np, x).tolist() == [4064.0]  # 4064.99 rounds to a multiple of 2


def test_q8_1_residual_is_sum_less_rounded_sum() -> None:
    x = rows(96)
    rounded = round_activation(np, x, T.Q4_1).astype(np.float64).reshape(3, 3, 32).sum(-1)
    np.testing.assert_allclose(q8_1_residual(np, x), q8_1_sums(np, x) - rounded, rtol=0, atol=1e-6)
    assert np.abs(q8_1_residual(np, x)).max() > 1e-4  # it is not rounding noise of float32


def test_quantize_activation_refuses_float_partners() -> None:
    for type_ in (T.F32, T.F16, T.BF16):
        with pytest.raises(ModelError, match=f"{type_.name}: activations are rounded to {type_.name}"):
            quantize_activation(np, rows(32), type_)


@pytest.mark.parametrize("type_", BLOCKED, ids=lambda t: t.name)
def test_round_activation_refuses_rows_that_split_blocks(type_: T) -> None:
    with pytest.raises(ModelError, match="activation rows of 48"):
        round_activation(np, rows(48), type_)


def test_round_activation_refuses_unsupported_types() -> None:
    with pytest.raises(ModelError, match="IQ4_NL"):
        round_activation(np, rows(64), T.IQ4_NL)
