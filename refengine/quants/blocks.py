"""ggml's tensor types: block layouts and dequantisation.

The same source runs on NumPy and on CuPy: the array module is passed in as `xp`. Block layouts are defined once, as
NumPy structured dtypes whose sizes are asserted. Because CuPy has no structured dtypes, the code reads fields as byte
columns of a (n_blocks, block_bytes) array, at the offsets of those dtypes.

All float32 operations have ggml's order (ggml/src/ggml-quants.c, `dequantize_row_*`), so the values have ggml's bits.

Independent of files, tensor names and models. GGUF is little-endian, and so are all supported machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from refengine.array import Array
from refengine.errors import ModelError

Type = GGMLQuantizationType
Decoder = Callable[[ModuleType, "Fields", Array], None]

# On the CPU, blocks are decoded in slices of this many elements, so that temporary arrays stay in its cache.
CHUNK_ELEMENTS = 1 << 17

LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F  # a mask for eight bytes at once
LOW_PAIRS = 0x0303030303030303
# For each byte, its eight bits as the fifth bits of eight codes: byte j of the word is 16 or 0, by bit j.
FIFTH_BITS = np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little").reshape(256, 8) * np.uint8(16)

# The float32 value of each of the 65,536 half-precision numbers, indexed by its bits.
HALF_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)

# MXFP4's E2M1 values, doubled; the doubling is undone by halving the block's scale (ggml-common.h, kvalues_fp4).
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


@dataclass(frozen=True)
class QuantFormat:
    """One ggml tensor type.

    `dtype` is the layout of one block, `block_size` the number of elements in it, and `partner` the type to which
    llama.cpp's CPU rounds the activation row before it multiplies with a weight of this type.
    """

    type: GGMLQuantizationType
    block_size: int
    dtype: np.dtype[Any]
    partner: str
    decode: Decoder = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.type.name)

    @property
    def block_bytes(self) -> int:
        return self.dtype.itemsize


class Fields:
    """Successive blocks as raw bytes (n, block_bytes) u8, with access to the fields of their layout by name."""

    def __init__(self, xp: ModuleType, blocks: Array, dtype: np.dtype[Any]) -> None:
        self.xp, self.blocks, self.dtype = xp, blocks, dtype

    def u8(self, name: str) -> Array:
        """A view of the field's bytes, (n, k) u8."""
        assert self.dtype.fields is not None
        sub, offset = self.dtype.fields[name][:2]
        return self.blocks[:, offset : offset + sub.itemsize]

    def i8(self, name: str) -> Array:
        """A view of the field's bytes as signed integers, (n, k) i8."""
        return self.u8(name).view(self.xp.int8)

    def f16(self, name: str) -> Array:
        """A half-precision scalar field, widened: (n, 1) f32."""
        assert self.dtype.fields is not None
        at = self.dtype.fields[name][1] // 2  # offsets and sizes of blocks with such fields are even
        return self.blocks.view(self.xp.float16)[:, at : at + 1].astype(self.xp.float32)


def _words(xp: ModuleType, packed: Array) -> Array:
    """A copy of bytes (n, k) u8 as words of eight bytes, (n, k / 8) u64, because NumPy shifts single bytes slowly.

    A view could be misaligned, which NumPy allows but a GPU does not.
    """
    return packed.copy().view(xp.uint64)


def _nibbles(xp: ModuleType, packed: Array, n_groups: int) -> Array:
    """4-bit codes, (n, n_groups, 2, bytes) u8: for each group of bytes first its low nibbles, then its high ones."""
    words = _words(xp, packed).reshape(packed.shape[0], n_groups, -1)
    low, high = words & LOW_NIBBLES, (words >> 4) & LOW_NIBBLES
    codes = xp.empty((words.shape[0], n_groups, 2, words.shape[2]), dtype=xp.uint64)
    if words.shape[2] == 2:  # Word by word, because NumPy is slow along short last axes.
        for word in range(2):
            codes[:, :, 0, word], codes[:, :, 1, word] = low[:, :, word], high[:, :, word]
    else:
        codes[:, :, 0], codes[:, :, 1] = low, high
    return codes.view(xp.uint8)


def _decode_f16(xp: ModuleType, blocks: Fields, out: Array) -> None:
    if xp is np:  # a table look-up is more than twice as fast as NumPy's own conversion
        np.take(HALF_VALUES, blocks.blocks.view(np.uint16), out=out, mode="clip")
    else:
        out[...] = blocks.f16("x")


def _decode_bf16(xp: ModuleType, blocks: Fields, out: Array) -> None:
    bits = xp.ascontiguousarray(blocks.u8("x")).view(xp.uint16)
    xp.left_shift(bits, 16, out=out.view(xp.uint32), dtype=xp.uint32)


def _decode_f32(xp: ModuleType, blocks: Fields, out: Array) -> None:
    out[...] = blocks.u8("x").view(xp.float32)


def _decode_q4_0(xp: ModuleType, blocks: Fields, out: Array) -> None:
    codes = _codes_q4(xp, blocks)
    codes -= 8
    xp.multiply(codes.view(xp.int8), blocks.f16("d"), out=out)


def _decode_q4_1(xp: ModuleType, blocks: Fields, out: Array) -> None:
    xp.multiply(_codes_q4(xp, blocks), blocks.f16("d"), out=out)
    out += blocks.f16("m")


def _codes_q4(xp: ModuleType, blocks: Fields) -> Array:
    """Codes 0..15 of Q4_0, Q4_1 and MXFP4, (n, 32) u8."""
    return _nibbles(xp, blocks.u8("qs"), 1).reshape(-1, 32)


def _codes_q5(xp: ModuleType, blocks: Fields) -> Array:
    """Codes 0..31 of Q5_0 and Q5_1, (n, 32) u8: the nibbles with bit j of `qh` as the fifth bit of element j."""
    codes = _codes_q4(xp, blocks)
    fifth = xp.take(xp.asarray(FIFTH_BITS.view(np.uint64)[:, 0]), blocks.u8("qh"))  # (n, 4) u64, eight codes each
    codes |= fifth.view(xp.uint8)
    return codes


def _decode_q5_0(xp: ModuleType, blocks: Fields, out: Array) -> None:
    codes = _codes_q5(xp, blocks)
    codes -= 16
    xp.multiply(codes.view(xp.int8), blocks.f16("d"), out=out)


def _decode_q5_1(xp: ModuleType, blocks: Fields, out: Array) -> None:
    xp.multiply(_codes_q5(xp, blocks), blocks.f16("d"), out=out)
    out += blocks.f16("m")


def _decode_q8_0(xp: ModuleType, blocks: Fields, out: Array) -> None:
    xp.multiply(blocks.i8("qs"), blocks.f16("d"), out=out)


def _decode_mxfp4(xp: ModuleType, blocks: Fields, out: Array) -> None:
    values = xp.take(xp.asarray(MXFP4_VALUES), _codes_q4(xp, blocks))
    exponent = blocks.u8("e").astype(xp.uint32)
    # half of 2^(e - 127); for e < 2 that is denormal. e = 255 (NaN by the OCP standard) is 2^127 in ggml.
    bits = xp.where(exponent < 2, xp.left_shift(0x00200000, exponent), (exponent - 1) << 23)
    xp.multiply(values, bits.astype(xp.uint32).view(xp.float32), out=out)


def six_bit_scales(xp: ModuleType, packed: Array) -> tuple[Array, Array]:
    """The eight scales and eight minimums of Q4_K and Q5_K blocks as integers: (n, 12) u8 → two (n, 8) u8.

    Twelve bytes contain sixteen 6-bit integers: the first four scales and minimums are in the low six bits of bytes
    0..3 and 4..7. The low nibbles of the last four are in bytes 8..11, their top two bits in the top bits of bytes
    0..7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = xp.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)  # (n, 8) u8
    minimums = xp.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)  # (n, 8) u8
    return scales, minimums


def _scales_k4(xp: ModuleType, blocks: Fields) -> tuple[Array, Array]:
    """The eight scales and eight minimums of a Q4_K or Q5_K block, both (n, 8, 1) f32 (`get_scale_min_k4`)."""
    scales, minimums = six_bit_scales(xp, blocks.u8("scales"))
    return (blocks.f16("d") * scales)[:, :, None], (blocks.f16("dmin") * minimums)[:, :, None]


def _codes_q4_k(xp: ModuleType, blocks: Fields) -> Array:
    """Codes 0..15, (n, 8, 32) u8."""
    return _nibbles(xp, blocks.u8("qs"), 4).reshape(-1, 8, 32)


def _codes_q5_k(xp: ModuleType, blocks: Fields) -> Array:
    """Codes 0..31, (n, 8, 32) u8."""
    codes = _codes_q4_k(xp, blocks)
    shift = xp.arange(8, dtype=xp.uint8)[None, :, None]
    fifth = blocks.u8("qh")[:, None, :] >> shift  # bit g of byte l belongs to element l of group g
    fifth &= 1
    fifth <<= 4
    codes |= fifth
    return codes


def _codes_q6_k(xp: ModuleType, blocks: Fields) -> Array:
    """Codes 0..63, (n, 2, 4, 32) u8."""
    low = _words(xp, blocks.u8("ql")).reshape(-1, 2, 2, 4)
    high = _words(xp, blocks.u8("qh")).reshape(-1, 2, 4)  # two bits of each byte for each of the four groups
    codes = xp.empty((low.shape[0], 2, 4, 4), dtype=xp.uint64)
    codes[:, :, :2] = low & LOW_NIBBLES
    codes[:, :, 2:] = (low >> 4) & LOW_NIBBLES
    for group in range(4):
        codes[:, :, group] |= ((high >> 2 * group) & LOW_PAIRS) << 4
    return codes.view(xp.uint8)


def _decode_q4_k(xp: ModuleType, blocks: Fields, out: Array) -> None:
    scale, minimum = _scales_k4(xp, blocks)
    groups = out.reshape(-1, 8, 32)
    xp.multiply(_codes_q4_k(xp, blocks), scale, out=groups)
    groups -= minimum


def _decode_q5_k(xp: ModuleType, blocks: Fields, out: Array) -> None:
    scale, minimum = _scales_k4(xp, blocks)
    groups = out.reshape(-1, 8, 32)
    xp.multiply(_codes_q5_k(xp, blocks), scale, out=groups)
    groups -= minimum


def _decode_q6_k(xp: ModuleType, blocks: Fields, out: Array) -> None:
    codes = _codes_q6_k(xp, blocks)
    codes -= 32
    scale = blocks.f16("d") * blocks.i8("scales")  # (n, 16) f32, one for 16 elements
    out[...] = codes.view(xp.int8).reshape(out.shape)
    out *= xp.repeat(scale, 16, axis=1)  # NumPy is slow along short last axes


def _format(type_: Type, partner: str, decode: Decoder, *fields: tuple[Any, ...]) -> QuantFormat:
    block_size, block_bytes = GGML_QUANT_SIZES[type_]
    layout = np.dtype(list(fields))
    assert layout.itemsize == block_bytes, f"{type_.name}: layout of {layout.itemsize} bytes, ggml has {block_bytes}"
    return QuantFormat(type_, block_size, layout, partner, decode)


_D, _M, _K_SCALES = ("d", "<f2"), ("m", "<f2"), (("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12))

SUPPORTED: dict[GGMLQuantizationType, QuantFormat] = {
    f.type: f
    for f in (
        _format(Type.F32, "F32", _decode_f32, ("x", "<f4")),
        _format(Type.F16, "F16", _decode_f16, ("x", "<f2")),
        _format(Type.BF16, "BF16", _decode_bf16, ("x", "<u2")),
        _format(Type.Q4_0, "Q8_0", _decode_q4_0, _D, ("qs", "u1", 16)),
        _format(Type.Q4_1, "Q8_1", _decode_q4_1, _D, _M, ("qs", "u1", 16)),
        _format(Type.Q5_0, "Q8_0", _decode_q5_0, _D, ("qh", "u1", 4), ("qs", "u1", 16)),
        _format(Type.Q5_1, "Q8_1", _decode_q5_1, _D, _M, ("qh", "u1", 4), ("qs", "u1", 16)),
        _format(Type.Q8_0, "Q8_0", _decode_q8_0, _D, ("qs", "i1", 32)),
        _format(Type.Q4_K, "Q8_K", _decode_q4_k, *_K_SCALES, ("qs", "u1", 128)),
        _format(Type.Q5_K, "Q8_K", _decode_q5_k, *_K_SCALES, ("qh", "u1", 32), ("qs", "u1", 128)),
        _format(Type.Q6_K, "Q8_K", _decode_q6_k, ("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D),
        _format(Type.MXFP4, "Q8_0", _decode_mxfp4, ("e", "u1"), ("qs", "u1", 16)),
    )
}


_CODES: dict[GGMLQuantizationType, Callable[[ModuleType, Fields], Array]] = {
    **dict.fromkeys((Type.Q4_0, Type.Q4_1, Type.MXFP4), _codes_q4),
    **dict.fromkeys((Type.Q5_0, Type.Q5_1), _codes_q5),
    Type.Q4_K: _codes_q4_k,
    Type.Q5_K: _codes_q5_k,
    Type.Q6_K: _codes_q6_k,
}


def codes(xp: ModuleType, blocks: Array, type_: GGMLQuantizationType) -> Array:
    """The unsigned integers that blocks (n, block_bytes) u8 of a type with 4 to 6 bits store: (n, block_size) u8."""
    fmt = SUPPORTED[type_]
    return _CODES[type_](xp, Fields(xp, blocks, fmt.dtype)).reshape(-1, fmt.block_size)


def require_supported(type_: GGMLQuantizationType | int, what: str) -> QuantFormat:
    """The format of `type_`; `what` (a tensor's name) goes into the message. Raises ModelError for other types."""
    known = {int(t) for t in Type}
    found = SUPPORTED.get(Type(type_)) if int(type_) in known else None
    if found is None:
        name = Type(type_).name if int(type_) in known else f"number {int(type_)}"
        supported = ", ".join(f.name for f in SUPPORTED.values())
        raise ModelError(f"{what}: tensor type {name} is not supported (supported: {supported}); requantise the model")
    return found


def _block_rows(raw: Array, fmt: QuantFormat, shape: tuple[int, ...]) -> Array:
    """`raw` as (n_blocks, block_bytes) u8, after checking that it holds exactly a tensor of `shape`."""
    n_elements = math.prod(shape)
    if not shape or shape[-1] % fmt.block_size:
        raise ModelError(f"{fmt.name}: rows of shape {shape} are not a multiple of {fmt.block_size} elements")
    n_bytes = n_elements // fmt.block_size * fmt.block_bytes
    if raw.dtype != np.uint8 or raw.size != n_bytes:
        raise ModelError(f"{fmt.name}: a tensor of shape {shape} has {n_bytes} bytes, got {raw.size} of {raw.dtype}")
    return raw.reshape(-1, fmt.block_bytes)


def dequantize(
    xp: ModuleType, raw: Array, type_: GGMLQuantizationType, shape: tuple[int, ...], out: Array | None = None
) -> Array:
    """The values of a stored tensor, float32 of `shape`, bit for bit those of ggml's `to_float`.

    `raw` is the tensor's bytes, (n_bytes,) u8, C-contiguous; `shape` is in NumPy order, its last axis the stored
    row. With `out` (C-contiguous float32 of `shape`) the values are written there and no array is allocated.
    Without it, F32 gives a view of `raw`. Scales that are Inf or NaN are handled as in ggml.
    Raises ModelError for an unsupported type, a row that is not a multiple of the block, a wrong number of bytes, or an
    invalid `out`.
    """
    fmt = require_supported(type_, "dequantize")
    blocks = _block_rows(raw, fmt, shape)
    if fmt.type == Type.F32 and out is None:
        return blocks.view(xp.float32).reshape(shape)
    if out is None:
        out = xp.empty(shape, dtype=xp.float32)
    elif out.dtype != np.float32 or out.shape != tuple(shape) or not out.flags.c_contiguous:
        raise ModelError(f"{fmt.name}: out must be C-contiguous float32 of shape {shape}, got {out.dtype} {out.shape}")
    values = out.reshape(-1, fmt.block_size)
    step = CHUNK_ELEMENTS // fmt.block_size if xp is np else max(1, blocks.shape[0])
    with np.errstate(all="ignore"):
        for start in range(0, blocks.shape[0], step):
            run = slice(start, start + step)
            fmt.decode(xp, Fields(xp, blocks[run], fmt.dtype), values[run])
    return out


def mins(xp: ModuleType, raw: Array, type_: GGMLQuantizationType, shape: tuple[int, ...]) -> Array:
    """The minimum m of every block of a Q4_1 or Q5_1 tensor, (*shape[:-1], shape[-1] / 32) f32; see `q8_1_residual`.

    Raises ModelError for a type without such minimums, and for a wrong number of bytes.
    """
    fmt = require_supported(type_, "mins")
    if fmt.partner != "Q8_1":
        raise ModelError(f"{fmt.name}: blocks of this type have no minimum (only those of Q4_1 and Q5_1 have one)")
    blocks = _block_rows(raw, fmt, shape)
    return Fields(xp, blocks, fmt.dtype).f16("m").reshape(*shape[:-1], shape[-1] // fmt.block_size)
