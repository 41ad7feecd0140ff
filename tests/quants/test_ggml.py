"""The quantised formats against ggml's own functions, bit for bit (NaN equals NaN)."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.quants import SUPPORTED, dequantize, mins, q8_1_residual, q8_1_sums, round_activation
from tests.ggml_ctypes import Ggml, load

pytestmark = pytest.mark.llamacpp
T = GGMLQuantizationType
PARTNERS = {"F16": T.F16, "BF16": T.BF16, "Q8_0": T.Q8_0, "Q8_1": T.Q8_1, "Q8_K": T.Q8_K}

# float16 bit patterns of scales: zeros, smallest and largest denormals and normals, one, Inf, NaN, signs
SCALES = [
    0x0000,
    0x8000,
    0x0001,
    0x83FF,
    0x03FF,
    0x0400,
    0x8400,
    0x3C00,
    0xBC00,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E01,
]


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return load()


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    at = np.flatnonzero(~same)
    assert same.all(), f"{at.size} of {same.size} differ, first at {at[0]}: {ours[at[0]]!r} and {theirs[at[0]]!r}"


def assert_same_values(ours: np.ndarray, theirs: np.ndarray) -> None:
    """As above, with -0 equal to 0: codes that ggml multiplies with a vanished scale keep their sign there."""
    assert_same_bits(ours + np.float32(0), theirs + np.float32(0))


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_dequantize_random_bits_equals_to_float(ggml: Ggml, type_: T) -> None:
    fmt = SUPPORTED[type_]
    n_blocks = 200_000 // fmt.block_size
    raw = np.random.default_rng(int(type_)).integers(0, 256, n_blocks * fmt.block_bytes, dtype=np.uint8)
    assert_same_bits(dequantize(np, raw, type_, (n_blocks * fmt.block_size,)), ggml.to_float(type_, raw))


@pytest.mark.parametrize("type_", [t for t, f in SUPPORTED.items() if f.block_size > 1], ids=lambda t: t.name)
def test_dequantize_extreme_scales_equal_to_float(ggml: Ggml, type_: T) -> None:
    fmt = SUPPORTED[type_]
    extremes = range(256) if type_ == T.MXFP4 else SCALES
    rng = np.random.default_rng(7)
    blocks = []
    for first in extremes:
        for second in [0] if type_ == T.MXFP4 else SCALES:
            block = rng.integers(0, 256, fmt.block_bytes, dtype=np.uint8).view(fmt.dtype)
            for name, value in zip(
                [n for n in ("d", "m", "dmin") if n in (fmt.dtype.names or ())], (first, second), strict=False
            ):
                block[name] = np.uint16(value).view(np.float16)
            if type_ == T.MXFP4:
                block["e"] = first
            blocks.append(block.view(np.uint8))
    raw = np.concatenate(blocks)
    assert_same_bits(dequantize(np, raw, type_, (len(blocks) * fmt.block_size,)), ggml.to_float(type_, raw))


def test_dequantize_every_half_and_bfloat16_bit_pattern(ggml: Ggml) -> None:
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    for type_ in (T.F16, T.BF16):
        assert_same_bits(dequantize(np, raw, type_, (65536,)), ggml.to_float(type_, raw))


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_partner_is_ggmls_vec_dot_type(ggml: Ggml, type_: T) -> None:
    assert T(ggml.traits_cpu(type_).vec_dot_type).name == SUPPORTED[type_].partner


def activation_rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    normal = rng.standard_normal((40, 512)).astype(np.float32)
    ties = rng.integers(-254, 255, (40, 512)).astype(np.float32) / 2  # every block has scale 1: half the codes are ties
    ties[:, ::32] = 127
    ties[:, 1::64] = -127
    # within a unit in the last place of a boundary between codes, so that another order of operations shows
    largest = rng.uniform(0.1, 10, (40, 1)).astype(np.float32)
    near_ties = ((rng.integers(-127, 127, (40, 512)) + np.float32(0.5)) / np.float32(127) * largest).astype(np.float32)
    near_ties[:, ::32] = largest
    lone = np.zeros((8, 512), np.float32)
    lone[np.arange(8), np.arange(8) * 37] = rng.standard_normal(8)
    return {
        "normal": normal,
        "ties": ties,
        "near_ties": near_ties,
        "equal_magnitudes": np.sign(normal) * np.float32(0.3),
        "zero": np.zeros((2, 512), np.float32),
        "lone": lone,
        "wide": (normal * np.exp(rng.uniform(-20, 20, normal.shape))).astype(np.float32),
        "half_denormal_scales": normal * np.float32(1e-5),
        "largest_scales": normal * np.float32(2e6),
    }


@pytest.mark.parametrize("kind", activation_rows())
@pytest.mark.parametrize("type_", [t for t in SUPPORTED if t != T.F32], ids=lambda t: t.name)
def test_round_activation_equals_from_float(ggml: Ggml, type_: T, kind: str) -> None:
    x = activation_rows()[kind]
    partner = PARTNERS[SUPPORTED[type_].partner]
    raw = ggml.from_float(partner, x.reshape(-1))
    if partner == T.Q8_1:  # ggml has no to_float for Q8_1: {f16 d, f16 s, 32 codes}
        blocks = raw.view(np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)]))
        with np.errstate(invalid="ignore"):  # code 0 times a scale that overflowed to Inf
            theirs = (blocks["qs"] * blocks["d"].astype(np.float32)[:, None]).reshape(-1)
        assert_same_bits(q8_1_sums(np, x).reshape(-1), blocks["s"].astype(np.float32))
    elif partner == T.Q8_K:
        blocks = raw.view(np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)]))
        theirs = (blocks["qs"] * blocks["d"][:, None]).reshape(-1)
    else:
        theirs = ggml.to_float(partner, raw)
    assert_same_bits(round_activation(np, x, type_).reshape(-1), theirs)


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-44, 1e30, 3e38])
@pytest.mark.parametrize("type_", [T.F16, T.BF16, T.Q4_0, T.Q6_K], ids=lambda t: t.name)
def test_round_activation_of_extreme_rows_equals_from_float(ggml: Ggml, type_: T, scale: float) -> None:
    x = (np.random.default_rng(13).uniform(-1, 1, (4, 256)) * scale).astype(np.float32)
    partner = PARTNERS[SUPPORTED[type_].partner]
    raw = ggml.from_float(partner, x.reshape(-1))
    with np.errstate(all="ignore"):
        if partner == T.Q8_K:
            blocks = raw.view(np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)]))
            theirs = (blocks["qs"] * blocks["d"][:, None]).reshape(-1)
        else:
            theirs = ggml.to_float(partner, raw)
    assert_same_values(round_activation(np, x, type_).reshape(-1), theirs)


@pytest.mark.parametrize("type_", [t for t in SUPPORTED if t != T.F32], ids=lambda t: t.name)
def test_product_of_rounded_values_equals_vec_dot(ggml: Ggml, type_: T) -> None:
    fmt = SUPPORTED[type_]
    rng = np.random.default_rng(int(type_))
    n_out, n_in = 24, 1280
    n_blocks = n_out * n_in // fmt.block_size
    blocks = rng.integers(0, 256, (n_blocks, fmt.block_bytes), dtype=np.uint8)
    layout = blocks.reshape(-1).view(fmt.dtype)
    for name in ("d", "m", "dmin", "x"):
        if name in (fmt.dtype.names or ()):
            values = rng.standard_normal(n_blocks) * 0.1
            is_bf16 = type_ == T.BF16
            layout[name] = (values.astype(np.float32).view(np.uint32) >> 16 if is_bf16 else values).astype(
                fmt.dtype[name]
            )
    if type_ == T.MXFP4:
        layout["e"] = rng.integers(118, 124, n_blocks)
    raw = blocks.reshape(-1)
    x = (rng.standard_normal((5, n_in)) + 0.5).astype(np.float32)

    partner = PARTNERS[fmt.partner]
    weight_rows = raw.reshape(n_out, -1)
    theirs = np.array([[ggml.vec_dot(type_, w, ggml.from_float(partner, row), n_in) for w in weight_rows] for row in x])
    weight = dequantize(np, raw, type_, (n_out, n_in)).astype(np.float64)
    ours = round_activation(np, x, type_).astype(np.float64) @ weight.T

    def nmse(y: np.ndarray) -> float:
        return float(((y - theirs) ** 2).mean() / (theirs**2).mean())

    if fmt.partner == "Q8_1":
        # control: without the term for the rounded block sums the product is visibly wrong
        assert nmse(ours) > 1e-10
        ours = ours + q8_1_residual(np, x).astype(np.float64) @ mins(np, raw, type_, (n_out, n_in)).astype(np.float64).T
    # ggml adds some hundred float32 terms; each addition rounds to 6e-8 relative, squared and averaged: about 1e-14
    assert nmse(ours) < 1e-12
