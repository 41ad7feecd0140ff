"""The layout of weights on the device: the same bits as in the file, in the order in which a warp multiplies them.

A matrix (n_out, n_in) is divided into tiles of 16 rows by 32 columns, which one warp multiplies in two
`mma.sync.m16n8k16`. Lane 4·r + c has columns 4c … 4c + 3 and 16 + 4c … 16 + 4c + 3 of rows r and r + 8 of a tile: four
for each mma. Activations have the same order (`activation_order`), so a lane's activations are 16 adjacent bytes. Eight
tiles side by side, 256 columns, are a segment, which is contiguous in memory, so that a warp copies it at once; the
segments of the same 16 rows follow one another, the last one with fewer tiles if the row ends in it. In a segment, each
part of a block (low bits, high bits, scales) has its own plane, tile after tile, so that a warp's loads are contiguous:

    low   4-bit types: a word of 8 nibbles per row; the even columns in nibbles 0…3, the odd ones in 4…7
          MXFP4: columns 0…3 in bits 7 and 3-1 of one byte each, columns 4…7 in bits 0 and 6-4 of these bytes
          Q8_0: 8 bytes per row.  F16: 8 halves per row
    high  the fifth bits (Q5_*: two bytes per lane) or fifth and sixth bits (Q6_K: four), in the order of `_high`
    scales  the scales of 256 columns of a row, for 16 rows together:
            Q4_0, Q5_0, Q8_0: eight d.  Q4_1, Q5_1: eight d, then eight m.  MXFP4: eight e
            Q4_K, Q5_K: the eight scales and eight minimums of six bits, one byte each (1.4 % more than in the file,
            but a quarter fewer instructions)
            Q6_K: the sixteen scales of one byte
    d       Q4_K, Q5_K: d and dmin, Q6_K: d, for 256 columns, 16 rows together

Rows are padded with zeros to whole tiles, and the scales to whole segments. F32 and BF16 matrices are unchanged,
because their products do not use tensor cores.
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
SEGMENT = 8  # blocks of 32 columns whose scales are stored together
_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column in nibble n of a word
_UNTILED = (Type.F32, Type.BF16)
_LARGEST_E = 240  # the largest e of MXFP4's scales 2^(e - 127) to which kernels can add 14
_LOW_BITS = {Type.F16: 16, Type.Q8_0: 8}  # all other types: 4
_HIGH_BITS = {Type.Q5_0: 1, Type.Q5_1: 1, Type.Q5_K: 1, Type.Q6_K: 2}
_D_BYTES = {Type.Q4_K: 4, Type.Q5_K: 4, Type.Q6_K: 2}  # per row and segment, like _SCALE_BYTES
_SCALE_BYTES = {
    **dict.fromkeys((Type.Q4_0, Type.Q5_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K), 16),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1), 32),
    Type.MXFP4: 8,
}
# The least number of temporary bytes per weight that `pack` needs, in addition to the stored bytes.
PACKING_BYTES = {
    **dict.fromkeys((Type.Q4_0, Type.Q4_1, Type.Q4_K), 5),
    **dict.fromkeys((Type.Q5_0, Type.Q5_1, Type.Q5_K), 9),
    Type.Q6_K: 13,
    Type.Q8_0: 2,
    Type.MXFP4: 3,
    Type.F16: 4,
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
    return n_expert * -(-n_out // TILE_ROWS) * _tile_row_bytes(kind, n_in)


def tile_bytes(kind: GGMLQuantizationType) -> tuple[int, int]:
    """The bytes of a tile's codes, and of the scales of a segment, of a tiled type."""
    bits = _LOW_BITS.get(kind, 4) + _HIGH_BITS.get(kind, 0)
    scales = _SCALE_BYTES.get(kind, 0) + _D_BYTES.get(kind, 0)
    return TILE_ROWS * TILE_COLUMNS * bits // 8, TILE_ROWS * scales


def segment_bytes(kind: GGMLQuantizationType) -> int:
    """The bytes of a whole segment of a tiled type: 16 rows of 256 columns, with their scales."""
    codes, scales = tile_bytes(kind)
    return SEGMENT * codes + scales


def _tile_row_bytes(kind: GGMLQuantizationType, n_in: int) -> int:
    """The bytes of 16 rows."""
    codes, scales = tile_bytes(kind)
    n_blocks = n_in // TILE_COLUMNS
    return n_blocks * codes + -(-n_blocks // SEGMENT) * scales


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
    codes, scales = _codes(xp, w.type, tiles, fields), _scales(xp, w.type, fields)
    data = _in_segments(xp, codes, scales, len(tiles), n_in // TILE_COLUMNS)
    return PackedMatrix(w.name, w.type, tuple(w.shape), data)


def _in_segments(xp: Any, codes: list[Array], scales: list[Array], n_tiles: int, n_blocks: int) -> Array:
    """Planes of a whole matrix, tile after tile or segment after segment → its data. n_tiles: rows of tiles."""
    by_tile = [plane.reshape(n_tiles, n_blocks, -1) for plane in codes]
    by_segment = [plane.reshape(n_tiles, -(-n_blocks // SEGMENT), -1) for plane in scales]
    whole = n_blocks // SEGMENT  # segments
    parts = []
    for first, last in ((0, whole), (whole, -(-n_blocks // SEGMENT))):
        if first < last:
            blocks = slice(first * SEGMENT, last * SEGMENT)
            planes = [plane[:, blocks].reshape(n_tiles, last - first, -1) for plane in by_tile]
            planes += [plane[:, first:last] for plane in by_segment]
            parts.append(xp.concatenate(planes, axis=2).reshape(n_tiles, -1))
    return (parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1)).reshape(-1)


def _scales(xp: Any, kind: GGMLQuantizationType, fields: dict[str, Array]) -> list[Array]:
    """The plane `scales` and, for Q4_K, Q5_K and Q6_K, `d`."""
    if kind == Type.F16:
        return []
    if kind == Type.Q6_K:
        return [_rows_together(xp, fields[name]) for name in ("scales", "d")]
    if kind in (Type.Q4_K, Type.Q5_K):
        both = xp.concatenate([fields["d"], fields["dmin"]], axis=-1)
        scales = xp.concatenate(quants.six_bit_scales(xp, fields["scales"].reshape(-1, 12)), axis=-1)
        scales = scales.reshape(*both.shape[:-1], 16)
        return [_rows_together(xp, scales), _rows_together(xp, both)]
    together = [_segments(xp, fields[name]) for name in ("d", "m", "e") if name in fields]
    return [_rows_together(xp, xp.concatenate(together, axis=-1))]


def _segments(xp: Any, field: Array) -> Array:
    """(n_tiles, 16, n_blocks, bytes) of blocks of 32 → (n_tiles, 16, n_segments, 8 · bytes), zeros at the end."""
    n_tiles, rows, n_blocks, size = field.shape
    missing = -n_blocks % SEGMENT
    if missing:
        field = xp.concatenate([field, xp.zeros((n_tiles, rows, missing, size), xp.uint8)], axis=2)
    return xp.ascontiguousarray(field).reshape(n_tiles, rows, -1, SEGMENT * size)


def _rows_together(xp: Any, field: Array) -> Array:
    """(n_tiles, 16, n, bytes) → for every tile and n, the bytes of the 16 rows one after another."""
    return xp.ascontiguousarray(field.transpose(0, 2, 1, 3)).reshape(-1)


def _codes(xp: Any, kind: GGMLQuantizationType, tiles: Array, fields: dict[str, Array]) -> list[Array]:
    """The plane `low` and, if the type has it, `high`."""
    if kind == Type.F16:
        return [_in_lanes(xp, fields["x"], 2).reshape(-1)]
    if kind == Type.Q8_0:
        return [_in_lanes(xp, fields["qs"], 1).reshape(-1)]
    natural = quants.codes(xp, tiles.reshape(-1, tiles.shape[-1]), kind).reshape(*tiles.shape[:2], -1)
    codes = _in_lanes(xp, natural, 1).reshape(len(tiles), -1, 32, 2, 8)  # (n_tiles, n_in / 32, lanes, rows, columns)
    if kind == Type.MXFP4:
        first, second = codes[..., :4], codes[..., 4:]  # sign, two bits of exponent, one of mantissa
        both = (first & 8) << 4 | (first & 7) << 1 | second >> 3 | (second & 7) << 4
        return [xp.ascontiguousarray(both.astype(xp.uint8)).reshape(-1)]
    ordered = codes[..., list(_NIBBLE_ORDER)]
    low = ordered & 15
    planes = [(low[..., 0::2] | (low[..., 1::2] << 4)).reshape(-1)]
    if "qh" in fields:
        planes.append(_high(xp, codes >> 4, kind == Type.Q6_K))
    return planes


def _high(xp: Any, bits: Array, two: bool) -> Array:
    """Upper bits of codes in lanes (…, 2 rows, 8 columns) → bytes of the plane `high`.

    Column pair i belongs to nibbles i and 4 + i of its word. Its bits are placed where `quants.cuh` can use them with
    at most one shift: those of the first pair at bit 0, of the second at 4, of the third and fourth one step higher, of
    row r + 8 two steps higher; the second column of a pair is eight bits (Q5_*) or sixteen bits (Q6_K, from bit 4 on)
    above.
    """
    places = np.zeros((2, 8), np.int64)
    for row in range(2):
        for column in range(8):
            pair, second = divmod(column, 2)
            if two:
                place = 4 + 4 * (pair % 2) + 2 * (pair // 2) + 16 * second
                places[row, column] = (place + 8 * row) % 32
            else:
                places[row, column] = 4 * (pair % 2) + pair // 2 + 2 * row + 8 * second
    dtype = xp.uint32 if two else xp.uint16
    words = (bits.astype(dtype) << xp.asarray(places.astype(np.uint32 if two else np.uint16))).sum(
        axis=(-2, -1), dtype=dtype
    )
    return words.astype(dtype).view(xp.uint8).reshape(-1)


def _in_lanes(xp: Any, field: Array, size: int) -> Array:
    """Elements of `size` bytes in column order → (n_tiles, n_in / 32, 8 r, 4 c, 2 rows, 2 halves, 4 · size)."""
    tiled = field.reshape(field.shape[0], 2, 8, -1, 2, 4, 4 * size)
    return xp.ascontiguousarray(tiled.transpose(0, 3, 2, 5, 1, 4, 6))


def activation_order(n_in: int) -> np.ndarray:
    """The column at each place of an activation row, (n_in,) int64."""
    within = np.arange(TILE_COLUMNS).reshape(2, 4, 4).transpose(1, 0, 2).reshape(-1)
    return (np.arange(0, n_in, TILE_COLUMNS)[:, None] + within).reshape(-1)
