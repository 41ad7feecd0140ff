"""The layout of weights on the device: the same bits as in the file, in the order in which a warp multiplies them.

A matrix (n_out, n_in) is divided into tiles of 16 rows and segments of 256 columns. A segment has up to eight blocks of
32 columns, in pairs: with n_pairs pairs, pair j is blocks j and j + n_pairs. A warp multiplies a block in one
`mma.sync.m16n8k32`, for which lane 4·r + c has columns 4c … 4c + 3 and 16 + 4c … 16 + 4c + 3 of rows r and r + 8. Its
codes are four words, one for each register of that instruction: columns 4c … of row r, of row r + 8, then columns
16 + 4c … of both. A segment is contiguous in memory, so that a warp copies it at once; the segments of the same 16 rows
follow one another, the last one with fewer pairs if the row ends in it. In a segment, each part of a block (low bits,
high bits, scales) has its own plane, pair after pair, so that a warp's loads are contiguous:

    low     4-bit codes: four words a lane; the low nibbles of their bytes are those of block j, the high nibbles those
            of block j + n_pairs. MXFP4: instead nibbles 0…3 and 4…7 of each word
            Q8_0: four words a lane for block j.  F16: eight halves for each row, block after block
    high    the fifth bits (Q5_*: one word a lane), or fifth and sixth bits (Q6_K: one word for each block), in the
            order of `_high`.  Q8_0: four words for block j + n_pairs
    scales  those of blocks c and c + n_pairs, in lane 4·r + c, for row r, then r + 8: d (Q4_0, Q5_0, Q8_0); d, then m
            (Q4_1, Q5_1); e (MXFP4); scales, then minimums of six bits, one byte each (Q4_K, Q5_K: 1.4 % more than in
            the file, but far fewer instructions).  Q6_K: in lane 4·r + 2·(j % 2) + half, the scales of that half of
            blocks j and j + n_pairs for j below 2, then for the others
    whole   Q4_K, Q5_K: d and dmin, Q6_K: d, for 256 columns of rows r and r + 8

Rows are padded with zeros to whole tiles, columns to whole pairs, and scales to whole segments. F32 and BF16 matrices
are unchanged, because their products do not use tensor cores.
`pack` is array code and runs on the device that has the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.array import Array
from refengine.errors import ModelError

Type = GGMLQuantizationType

TILE_ROWS, TILE_COLUMNS = 16, 32
SEGMENT = 8  # blocks of 32 columns
MOST_PAIRS = SEGMENT // 2
_UNTILED = (Type.F32, Type.BF16)
_LARGEST_E = 240  # of MXFP4's scales 2^(e - 127): products with them stay finite
_LOW_BITS = {Type.F16: 16, Type.Q8_0: 8}  # all other types: 4
_HIGH_BITS = {Type.Q5_0: 1, Type.Q5_1: 1, Type.Q5_K: 1, Type.Q6_K: 2}
_WHOLE_BYTES = {Type.Q4_K: 4, Type.Q5_K: 4, Type.Q6_K: 2}  # per row and segment, like _SCALE_BYTES
_SCALE_BYTES = {
    **dict.fromkeys((Type.Q4_0, Type.Q5_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K), 16),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1), 32),
    Type.MXFP4: 8,
}
# The least number of temporary bytes per weight that `pack` needs, in addition to the stored bytes.
PACKING_BYTES = {
    **dict.fromkeys((Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q8_0, Type.MXFP4), 3),
    **dict.fromkeys((Type.Q5_0, Type.Q5_1, Type.Q5_K, Type.Q6_K, Type.F16), 4),
}


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix on the device. shape: (n_out, n_in) or (n_expert, n_out, n_in). data: its bytes, u8."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Array

    @property
    def is_float(self) -> bool:
        """Whether products are computed in float32, by the kernels of matmul_f32.cu."""
        return self.type in _UNTILED

    @cached_property
    def float_rows(self) -> Array:
        """The rows of an F32 or BF16 matrix as an argument of its kernels."""
        return self.data.view(np.float32 if self.type == Type.F32 else np.uint16)

    @property
    def n_bytes(self) -> int:
        return int(self.data.nbytes)


def rows_of(w: PackedMatrix, start: int, stop: int) -> PackedMatrix:
    """Outputs start..stop of a matrix (n_out, n_in), in the same memory.

    Raises ModelError unless they begin and end at tile boundaries.
    """
    n_out, n_in = w.shape
    if not w.is_float and (start % TILE_ROWS or stop % TILE_ROWS):
        raise ModelError(f"{w.name}: outputs {start} to {stop} do not begin and end with a tile of {TILE_ROWS}")
    n = n_out if w.is_float else -(-n_out // TILE_ROWS) * TILE_ROWS  # rows that the data have
    data = w.data[len(w.data) * start // n : len(w.data) * stop // n]
    return PackedMatrix(w.name, w.type, (stop - start, n_in), data)


def packed_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """The bytes of a matrix (n_out, n_in) or (n_expert, n_out, n_in)."""
    n_expert, (n_out, n_in) = int(np.prod(shape[:-2], dtype=np.int64)), shape[-2:]
    if kind in _UNTILED:
        fmt = quants.SUPPORTED[kind]
        return n_expert * n_out * n_in // fmt.block_size * fmt.block_bytes
    return n_expert * -(-n_out // TILE_ROWS) * tile_bytes(kind, n_in)


def pair_bytes(kind: GGMLQuantizationType) -> tuple[int, int]:
    """The bytes of the codes of 16 rows of a pair of blocks, and of the scales of a segment, of a tiled type."""
    bits = _LOW_BITS.get(kind, 4) + _HIGH_BITS.get(kind, 0)
    scales = _SCALE_BYTES.get(kind, 0) + _WHOLE_BYTES.get(kind, 0)
    return TILE_ROWS * 2 * TILE_COLUMNS * bits // 8, TILE_ROWS * scales


def segment_bytes(kind: GGMLQuantizationType) -> int:
    """The bytes of a whole segment of a tiled type: 16 rows of 256 columns, with their scales."""
    codes, scales = pair_bytes(kind)
    return MOST_PAIRS * codes + scales


def tile_bytes(kind: GGMLQuantizationType, n_in: int) -> int:
    """The bytes of a tile, 16 rows of n_in columns, of a tiled type."""
    codes, scales = pair_bytes(kind)
    n_pairs = -(-n_in // (2 * TILE_COLUMNS))
    return n_pairs * codes + -(-n_pairs // MOST_PAIRS) * scales


def pack(xp: Any, w: Any) -> PackedMatrix:
    """Reorder a stored matrix (a `weights.Matrix`, or an object with name, type, shape and data) for the device.

    Raises ModelError if the row length is not a multiple of 32 columns.
    """
    n_in = w.shape[-1]
    if w.type in _UNTILED:
        return PackedMatrix(w.name, w.type, tuple(w.shape), w.data)
    if n_in % TILE_COLUMNS:
        raise ModelError(f"{w.name}: rows of {n_in} are not a multiple of {TILE_COLUMNS}, which the kernels need")
    n_expert = int(np.prod(w.shape[:-2], dtype=np.int64))
    fmt = quants.SUPPORTED[w.type]
    blocks = w.data.reshape(n_expert, w.shape[-2], n_in // fmt.block_size, fmt.block_bytes)
    missing = -w.shape[-2] % TILE_ROWS
    if missing:
        blocks = xp.concatenate([blocks, xp.zeros((n_expert, missing, *blocks.shape[2:]), xp.uint8)], axis=1)
    tiles = blocks.reshape(-1, TILE_ROWS, *blocks.shape[2:])  # (n_tiles, 16, n_blocks, block_bytes)
    assert fmt.dtype.fields is not None
    fields = {}
    for name, (sub, offset, *_) in fmt.dtype.fields.items():
        fields[name] = tiles[..., offset : offset + sub.itemsize]
    if "e" in fields and int(fields["e"].max()) > _LARGEST_E:
        raise ModelError(f"{w.name}: a scale of 2^{int(fields['e'].max()) - 127}; the kernels allow less than 2^114")
    codes = _codes(xp, w.type, tiles, fields)
    scales, whole = _scales(xp, w.type, fields)
    n_blocks, n_whole = n_in // TILE_COLUMNS, n_in // TILE_COLUMNS // SEGMENT * SEGMENT
    parts = []
    for first, last in ((0, n_whole), (n_whole, n_blocks)):  # whole segments, and one that is not
        if first == last:
            continue
        n_segments = -(-(last - first) // SEGMENT)
        n_pairs = -(-(last - first) // (2 * n_segments))
        planes = _in_lanes(xp, w.type, _in_pairs(xp, codes, first, last, n_segments, n_pairs))
        if w.type == Type.Q6_K:
            assert scales is not None
            planes.append(_scales_of_halves(xp, scales))
        elif scales is not None:
            planes.append(_scales_in_lanes(xp, _in_pairs(xp, scales, first, last, n_segments, n_pairs)))
        if whole is not None:
            both = whole.reshape(len(whole), 2, 8, n_segments, -1)
            planes.append(both.transpose(0, 3, 2, 1, 4))  # (n_tiles, n_segments, r, rows r and r + 8, bytes)
        flat = [xp.ascontiguousarray(plane).reshape(len(tiles), n_segments, -1) for plane in planes]
        parts.append(xp.concatenate(flat, axis=2).reshape(len(tiles), -1))
    data = parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1)
    return PackedMatrix(w.name, w.type, tuple(w.shape), data.reshape(-1))


def _codes(xp: Any, kind: GGMLQuantizationType, tiles: Array, fields: dict[str, Array]) -> Array:
    """The codes in the order of columns, (n_tiles, 16, n_blocks, 32) bytes; of F16, (n_tiles, 16, n_blocks, 64)."""
    if kind == Type.F16:
        return fields["x"].reshape(*tiles.shape[:2], -1, 2 * TILE_COLUMNS)
    if kind == Type.Q8_0:
        natural = fields["qs"]
    else:
        natural = quants.codes(xp, tiles.reshape(-1, tiles.shape[-1]), kind)
    return natural.reshape(*tiles.shape[:2], -1, TILE_COLUMNS)


def _scales(xp: Any, kind: GGMLQuantizationType, fields: dict[str, Array]) -> tuple[Array | None, Array | None]:
    """Scales of blocks (n_tiles, 16, n_blocks, n, bytes), n of them one after another, and those of 256 columns.

    Q6_K: its scales (n_tiles, 16, n_segments, 16). Those of 256 columns: (n_tiles, 16, n_segments, bytes).
    """
    if kind == Type.F16:
        return None, None
    if kind == Type.Q6_K:
        return fields["scales"], fields["d"]
    if kind in (Type.Q4_K, Type.Q5_K):
        whole = xp.concatenate([fields["d"], fields["dmin"]], axis=-1)
        both = xp.stack(quants.six_bit_scales(xp, fields["scales"].reshape(-1, 12)), axis=-1)  # (·, 8, 2)
        return both.reshape(*whole.shape[:2], -1, 2, 1), whole
    return xp.stack([fields[name] for name in ("d", "m", "e") if name in fields], axis=-2), None


def _in_pairs(xp: Any, field: Array, first: int, last: int, n_segments: int, n_pairs: int) -> Array:
    """Blocks first … last of (n_tiles, 16, n_blocks, …) → (n_tiles, 16, n_segments, 2, n_pairs, …), with zeros at the
    end."""
    part = field[:, :, first:last]
    missing = 2 * n_pairs * n_segments - (last - first)
    if missing:
        part = xp.concatenate([part, xp.zeros((*part.shape[:2], missing, *part.shape[3:]), xp.uint8)], axis=2)
    return xp.ascontiguousarray(part).reshape(*part.shape[:2], n_segments, 2, n_pairs, *part.shape[3:])


def _scales_in_lanes(xp: Any, scales: Array) -> Array:
    """(n_tiles, 16, n_segments, 2, n_pairs, n, bytes) → (n_tiles, n_segments, 8 r, 4 c, 2 rows, n, 2 blocks, bytes)."""
    n_tiles, _, n_segments, _, n_pairs, n, size = scales.shape
    if n_pairs < MOST_PAIRS:
        missing = xp.zeros((n_tiles, 16, n_segments, 2, MOST_PAIRS - n_pairs, n, size), xp.uint8)
        scales = xp.concatenate([scales, missing], axis=4)
    of_rows = scales.reshape(n_tiles, 2, 8, n_segments, 2, MOST_PAIRS, n, size)
    return of_rows.transpose(0, 3, 2, 5, 1, 6, 4, 7)


def _scales_of_halves(xp: Any, scales: Array) -> Array:
    """Q6_K's (n_tiles, 16, n_segments, 16) → (n_tiles, n_segments, 8 r, 2 j % 2, 2 halves, 2 rows, 2 j // 2, 2).

    The last one is the block of pair j: j or j + n_pairs.
    """
    of_rows = xp.ascontiguousarray(scales).reshape(
        len(scales), 2, 8, -1, 2, 2, 2, 2
    )  # rows, r, segments, block, j…, half
    return of_rows.transpose(0, 3, 2, 6, 7, 1, 5, 4)


def _in_lanes(xp: Any, kind: GGMLQuantizationType, codes: Array) -> list[Array]:
    """Codes (n_tiles, 16, n_segments, 2 blocks, n_pairs, 32) → the planes `low` and, if the type has it, `high`.

    Each is (n_tiles, n_segments, …).
    """
    n_tiles, _, n_segments, _, n_pairs, width = codes.shape
    tiled = codes.reshape(
        n_tiles, 2, 8, n_segments, 2, n_pairs, 2, 4, width // 8
    )  # rows, r, ·, block, pair, half, c, bytes
    if kind == Type.F16:
        return [tiled.transpose(0, 3, 4, 5, 2, 7, 1, 6, 8)]
    lanes = xp.ascontiguousarray(tiled.transpose(0, 3, 5, 2, 7, 4, 6, 1, 8))  # ·, pair, r, c, block, half, rows, bytes
    first, second = lanes[:, :, :, :, :, 0], lanes[:, :, :, :, :, 1]
    if kind == Type.Q8_0:
        return [first, second]
    if kind == Type.MXFP4:  # two columns a byte, and two bytes for each block
        return [xp.concatenate([part[..., 0::2] | part[..., 1::2] << 4 for part in (first, second)], axis=-1)]
    planes = [first & 15 | second << 4]
    if kind in _HIGH_BITS:
        planes.append(_high(xp, lanes >> 4, _HIGH_BITS[kind]))
    return planes


def _high(xp: Any, bits: Array, n: int) -> Array:
    """Upper bits of codes (…, 2 blocks, 2 halves, 2 rows, 4 bytes), n of each → bytes of the plane `high`.

    A bit is in the byte with the number of its code's byte. There, registers have n bits each, one after another. For
    one bit, both blocks share a word, so that the second block's registers follow those of the first.
    """
    registers = bits.reshape(*bits.shape[:-3], 4, 4)  # (…, block, register, byte)
    if n == 1:
        registers = registers.reshape(*registers.shape[:-3], 8, 4)
    shifts = (n * np.arange(registers.shape[-2], dtype=np.uint8))[:, None]
    return (registers << xp.asarray(shifts)).sum(axis=-2, dtype=xp.uint8)


def activation_order() -> np.ndarray:
    """The column of a block of 32 at each place of a block of activations, (32,) int64."""
    return np.arange(TILE_COLUMNS).reshape(2, 4, 4).transpose(1, 0, 2).reshape(-1)
