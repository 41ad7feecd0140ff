"""Dequantisation against hand-computed blocks and scalar re-implementations written from the format descriptions.

The comparison with ggml's own code is in test_quants_ggml.py.
"""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from refengine.errors import ModelError
from refengine.quants import SUPPORTED, dequantize, mins, require_supported
from refengine.quants.blocks import CHUNK_ELEMENTS, _words

T = GGMLQuantizationType
NAMES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]


def random_raw(type_: T, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes with tame scales (exponent field of every float16 below 16), so that no value is Inf or NaN."""
    fmt = SUPPORTED[type_]
    blocks = np.random.default_rng(seed).integers(0, 256, (n_blocks, fmt.block_bytes), dtype=np.uint8)
    assert fmt.dtype.fields is not None
    for name, (sub, offset) in ((n, v[:2]) for n, v in fmt.dtype.fields.items()):
        if name in ("d", "m", "dmin", "x"):
            blocks[:, offset + sub.itemsize - 1] &= 0x3F
        if name == "e":
            blocks[:, offset] = 100 + blocks[:, offset] % 40
    return blocks.reshape(-1)


def scalar_block(type_: T, block: bytes) -> list[np.float32]:
    """One block's values, element by element, in Python integers and float32."""
    f32 = np.float32

    def f16(at: int) -> np.float32:
        return f32(np.frombuffer(block, "<f2", 1, at)[0])

    def bit(at: int, i: int) -> int:
        return block[at + i // 8] >> (i % 8) & 1

    def nibble(at: int, i: int) -> int:
        return block[at + i % 16] >> 4 * (i // 16) & 15

    if type_ == T.F32:
        return [np.frombuffer(block, "<f4")[0]]
    if type_ == T.F16:
        return [f16(0)]
    if type_ == T.BF16:
        return [np.frombuffer(bytes(2) + block, "<f4")[0]]
    if type_ == T.Q4_0:
        return [f16(0) * f32(nibble(2, i) - 8) for i in range(32)]
    if type_ == T.Q4_1:
        return [f16(0) * f32(nibble(4, i)) + f16(2) for i in range(32)]
    if type_ == T.Q5_0:
        return [f16(0) * f32(nibble(6, i) + 16 * bit(2, i) - 16) for i in range(32)]
    if type_ == T.Q5_1:
        return [f16(0) * f32(nibble(8, i) + 16 * bit(4, i)) + f16(2) for i in range(32)]
    if type_ == T.Q8_0:
        return [f16(0) * f32(np.int8(np.uint8(block[2 + i]))) for i in range(32)]
    if type_ == T.MXFP4:
        fp4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        codes = [nibble(1, i) for i in range(32)]
        return [f32((-1 if c & 8 else 1) * fp4[c & 7] * 2.0 ** (block[0] - 127)) for c in codes]
    if type_ == T.Q6_K:
        values = []
        for i in range(256):
            half, group, lane = i // 128, i % 128 // 32, i % 32
            low = block[64 * half + 32 * (group % 2) + lane] >> 4 * (group // 2) & 15
            high = block[128 + 32 * half + lane] >> 2 * group & 3
            scale = f32(np.int8(np.uint8(block[192 + i // 16])))
            values.append(f16(208) * scale * f32(low + 16 * high - 32))
        return values
    scales = block[4:16]
    six_bit = [s & 63 for s in scales[:8]] + [
        (s >> 4 * half & 15) | scales[i + 4 * half] >> 6 << 4 for half in (0, 1) for i, s in enumerate(scales[8:])
    ]
    sc, m = six_bit[:4] + six_bit[8:12], six_bit[4:8] + six_bit[12:]
    qs = block[16:] if type_ == T.Q4_K else block[48:]
    values = []
    for i in range(256):
        group, lane = i // 32, i % 32
        code = qs[32 * (group // 2) + lane] >> 4 * (group % 2) & 15
        if type_ == T.Q5_K:
            code += 16 * (block[16 + lane] >> group & 1)
        values.append(f16(0) * f32(sc[group]) * f32(code) - f16(2) * f32(m[group]))
    return values


def test_supported_types_are_exactly_the_required_set() -> None:
    assert [f.name for f in SUPPORTED.values()] == NAMES


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_layout_sizes_equal_ggml(type_: T) -> None:
    fmt = SUPPORTED[type_]
    assert (fmt.block_size, fmt.block_bytes) == GGML_QUANT_SIZES[type_]


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_dequantize_equals_scalar_arithmetic_bit_for_bit(type_: T) -> None:
    fmt = SUPPORTED[type_]
    raw = random_raw(type_, 7 if fmt.block_size > 1 else 33)
    expected = [v for b in raw.reshape(-1, fmt.block_bytes) for v in scalar_block(type_, b.tobytes())]
    values = dequantize(np, raw, type_, (len(expected),))
    np.testing.assert_array_equal(values.view(np.uint32), np.array(expected, np.float32).view(np.uint32))


def test_dequantize_q4_0_block_by_hand() -> None:
    # d = 0.5; the low nibbles of bytes 0..15 are elements 0..15, the high nibbles elements 16..31
    raw = np.frombuffer(np.float16(0.5).tobytes() + bytes([0xF0, 0x07, *[0x88] * 14]), np.uint8)
    values = dequantize(np, raw, T.Q4_0, (1, 32))
    assert values[0, :3].tolist() == [-4.0, -0.5, 0.0]
    assert values[0, 16:19].tolist() == [3.5, -4.0, 0.0]


def test_dequantize_mxfp4_block_by_hand() -> None:
    # e = 128 is a scale of 2; codes 1 and 15 are 0.5 and -6
    values = dequantize(np, np.frombuffer(bytes([128, 0xF1, *[0] * 15]), np.uint8), T.MXFP4, (32,))
    assert (values[0], values[16], values[1]) == (1.0, -12.0, 0.0)


@pytest.mark.parametrize("e", [0, 1, 2, 3, 254, 255])
def test_dequantize_mxfp4_extreme_exponents(e: int) -> None:
    # code 2 is 1.0: the scale itself, 2^(e - 127). 255 (NaN by the OCP standard) gives 2^127 times 2, which overflows
    value = dequantize(np, np.frombuffer(bytes([e, 0x02, *[0] * 15]), np.uint8), T.MXFP4, (32,))[0]
    assert value == (np.inf if e == 255 else np.float32(2.0 ** (e - 127)))


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_dequantize_of_many_chunks_equals_block_by_block(type_: T) -> None:
    fmt = SUPPORTED[type_]
    n_blocks = CHUNK_ELEMENTS // fmt.block_size * 2 + 3  # two full slices and a tail
    raw = random_raw(type_, n_blocks, seed=5)
    whole = dequantize(np, raw, type_, (n_blocks, fmt.block_size))
    for at in (0, CHUNK_ELEMENTS // fmt.block_size - 1, CHUNK_ELEMENTS // fmt.block_size, n_blocks - 1):
        one = dequantize(np, raw[at * fmt.block_bytes : (at + 1) * fmt.block_bytes], type_, (fmt.block_size,))
        np.testing.assert_array_equal(whole[at], one)


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_dequantize_into_out_writes_there(type_: T) -> None:
    fmt = SUPPORTED[type_]
    raw = random_raw(type_, 6, seed=3)
    raw.flags.writeable = False  # a view of a mapped file is read-only
    shape = (2, 3, fmt.block_size)
    out = np.full(shape, np.nan, np.float32)
    assert dequantize(np, raw, type_, shape, out=out) is out
    np.testing.assert_array_equal(out, dequantize(np, raw, type_, shape))


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_words_of_eight_bytes_are_aligned(n_blocks: int) -> None:
    # A GPU refuses a misaligned word; NumPy does not, so that only this test would see it here.
    blocks = np.arange(n_blocks * 22, dtype=np.uint8).reshape(n_blocks, 22)
    for offset in range(7):
        words = _words(np, blocks[:, offset : offset + 16])
        assert words.flags.aligned
        np.testing.assert_array_equal(words.view(np.uint8), blocks[:, offset : offset + 16])


def test_dequantize_f32_without_out_is_a_view() -> None:
    raw = random_raw(T.F32, 8)
    assert np.shares_memory(raw, dequantize(np, raw, T.F32, (2, 4)))


def test_dequantize_refuses_unusable_out() -> None:
    raw = random_raw(T.Q8_0, 4)
    for out in (np.empty((2, 64)), np.empty((64, 2), np.float32), np.empty((2, 128), np.float32)[:, ::2]):
        with pytest.raises(ModelError, match="out must be C-contiguous float32"):
            dequantize(np, raw, T.Q8_0, (2, 64), out=out)


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
@pytest.mark.parametrize("delta", [-1, 1])
def test_dequantize_refuses_wrong_byte_counts(type_: T, delta: int) -> None:
    fmt = SUPPORTED[type_]
    raw = np.zeros(3 * fmt.block_bytes + delta, np.uint8)
    with pytest.raises(ModelError, match=rf"{fmt.name}.*has {3 * fmt.block_bytes} bytes, got {raw.size}"):
        dequantize(np, raw, type_, (3, fmt.block_size))


def test_dequantize_refuses_rows_that_split_blocks() -> None:
    with pytest.raises(ModelError, match=r"Q4_K: rows of shape \(2, 128\) are not a multiple of 256 elements"):
        dequantize(np, np.zeros(144, np.uint8), T.Q4_K, (2, 128))


@pytest.mark.parametrize("type_", [t for t in T if t not in SUPPORTED], ids=lambda t: t.name)
def test_every_other_type_is_refused_by_name(type_: T) -> None:
    with pytest.raises(ModelError, match=rf"blk\.0\.attn_q\.weight: tensor type {type_.name} is not supported"):
        require_supported(type_, "blk.0.attn_q.weight")
    with pytest.raises(ModelError, match=type_.name):
        dequantize(np, np.zeros(64, np.uint8), type_, (32,))


def test_unknown_type_number_is_refused() -> None:
    with pytest.raises(ModelError, match="type number 999 is not supported"):
        require_supported(999, "x")


@pytest.mark.parametrize("type_", [T.Q4_1, T.Q5_1], ids=lambda t: t.name)
def test_mins_are_the_values_of_zero_codes(type_: T) -> None:
    blocks = random_raw(type_, 6, seed=9).reshape(6, -1)
    blocks[:, 4:] = 0
    found = mins(np, blocks.reshape(-1), type_, (2, 96))
    assert found.shape == (2, 3)
    values = dequantize(np, blocks.reshape(-1), type_, (2, 96)).reshape(2, 3, 32)
    np.testing.assert_array_equal(values, np.broadcast_to(found[..., None], values.shape))
    assert len(np.unique(found)) == 6


def test_mins_refuses_types_without() -> None:
    with pytest.raises(ModelError, match="Q4_K"):
        mins(np, np.zeros(144, np.uint8), T.Q4_K, (256,))
