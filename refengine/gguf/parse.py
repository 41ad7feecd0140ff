"""Parses one GGUF file strictly: every count, length, offset and name is checked before it is used.

Reads the header, metadata and tensor index of one file of version 2 or 3. Split files are handled in `split.py`.

Format: the GGUF specification (ggml `docs/gguf.md`), and ggml's `src/gguf.cpp` where the specification is silent.
Deliberately stricter than ggml: bool values other than 0 and 1, invalid UTF-8, NUL in names, tensors of zero
dimensions or of zero size, overlapping data, and counts far beyond any real file are refused. More lenient in two
places: data may have gaps or another order than the index (the specification allows it), and a tensor name may be
64 bytes long (ggml allows 63). Arrays of arrays are in the specification, but no reader of models accepts them,
including ggml; they are refused.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from refengine.gguf.cursor import INT64_MAX, Cursor, OpenFile, quoted, signed

MAX_TENSORS = 9_999  # a real model of 10,000 tensors does not exist
MAX_KEYS = 1 << 16  # real files have fewer than 100
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's limit
MAX_NAME_BYTES = 64  # the specification's limit
MAX_ARRAY_ELEMENTS = 1 << 24  # the largest real array is a vocabulary or its merges, below 2**20
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
METADATA_START = 24  # after magic, version and two counts

INTEGER_TYPES = frozenset(
    {
        GGUFValueType.UINT8,
        GGUFValueType.INT8,
        GGUFValueType.UINT16,
        GGUFValueType.INT16,
        GGUFValueType.UINT32,
        GGUFValueType.INT32,
        GGUFValueType.UINT64,
        GGUFValueType.INT64,
    }
)

_SCALAR_DTYPES: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_VALUE_TYPES = {int(t): t for t in GGUFValueType}
_TENSOR_TYPES = {int(t): t for t in GGML_QUANT_SIZES}
_REMOVED_TENSOR_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})  # numbers that ggml once used
_FOREIGN_MAGIC = {
    b"FUGG": "the magic is byte-swapped",
    b"lmgg": "this is the older GGML format; convert the model again",
    b"fmgg": "this is the older GGMF format; convert the model again",
    b"tjgg": "this is the older GGJT format; convert the model again",
    b"vers": "this looks like a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"PK\x03\x04": "this is a zip archive",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, type, shape and place. `shape` is in NumPy order, the reverse of ggml's `ne`."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # of its data, from the start of its file
    n_bytes: int
    shard: int  # index of its file; 0 unless the model is split


@dataclass(frozen=True)
class MetadataEntry:
    """One key-value pair: the Python value, its type in the file, and the byte offset of the pair."""

    value: Any  # int, float, bool, str, list[str] or a read-only np.ndarray
    type: GGUFValueType
    element_type: GGUFValueType | None  # of an array
    offset: int

    @property
    def type_name(self) -> str:
        """`uint32`, `string`, `array of float32`, ..."""
        if self.element_type is None:
            return self.type.name.lower()
        return f"array of {self.element_type.name.lower()}"


@dataclass(frozen=True)
class Shard:
    """One parsed file."""

    file: OpenFile
    version: int
    alignment: int
    entries: dict[str, MetadataEntry]
    tensors: tuple[TensorInfo, ...]  # in file order, `shard` 0
    tensor_info_offsets: dict[str, int]  # name -> byte offset of its entry in the index

    @property
    def path(self) -> Path:
        return self.file.path


def open_shard(path: Path) -> Shard:
    """Map and check one file. Raises GGUFError for anything that is not well-formed GGUF of version 2 or 3."""
    file = OpenFile(path)
    try:
        return parse(file)
    except BaseException:
        file.close()
        raise


def parse(file: OpenFile) -> Shard:
    """Check a file. Raises the errors of `open_shard`."""
    cursor = Cursor(file)
    version = _header_version(cursor)
    # The smallest tensor entry: name length, 1 byte, n_dims, 1 dimension, type, offset. The smallest pair: key
    # length, 1 byte, value type, 1 byte.
    n_tensors = cursor.count("tensors", MAX_TENSORS, 8 + 1 + 4 + 8 + 4 + 8)
    n_keys = cursor.count("metadata keys", MAX_KEYS, 8 + 1 + 4 + 1)
    entries: dict[str, MetadataEntry] = {}
    for index in range(n_keys):
        key_start = cursor.pos
        key = cursor.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in entries:
            raise cursor.error(key_start, f"duplicate metadata key {quoted(key)}, first at byte {entries[key].offset}")
        entries[key] = _metadata_entry(cursor, key, key_start)
    alignment = _alignment(cursor, entries.get("general.alignment"))

    tensors: list[TensorInfo] = []  # offsets relative to the data section, which begins after the last entry
    info_offsets: dict[str, int] = {}
    for index in range(n_tensors):
        info_start = cursor.pos
        info = _tensor_info(cursor, index, alignment)
        if info.name in info_offsets:
            raise cursor.error(
                info_start, f"duplicate tensor name {quoted(info.name)}, first at byte {info_offsets[info.name]}"
            )
        info_offsets[info.name] = info_start
        tensors.append(info)
    data_start = -(-cursor.pos // alignment) * alignment
    placed = tuple(TensorInfo(t.name, t.type, t.shape, data_start + t.offset, t.n_bytes, t.shard) for t in tensors)
    _check_extents(cursor, placed, info_offsets)
    return Shard(file, version, alignment, entries, placed, info_offsets)


def _header_version(cursor: Cursor) -> int:
    magic = cursor.read(min(4, cursor.size), "the magic")
    if magic != b"GGUF":
        if b"GGUF".startswith(magic):
            raise cursor.error(0, f"the file ends inside the magic: 4 bytes needed, {len(magic)} are left")
        hint = _FOREIGN_MAGIC.get(magic)
        raise cursor.error(0, f"bad magic {magic!r}; expected b'GGUF'" + (f": {hint}" if hint else ""))
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version == 1:
        raise cursor.error(
            4, "version 1 of GGUF (32-bit counts) is not supported, only 2 and 3; convert the model again"
        )
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        raise cursor.error(
            4,
            f"the version 0x{version:08x} is byte-swapped: a big-endian file of version {swapped}; "
            "expected a little-endian one",
        )
    raise cursor.error(4, f"unknown version {version} of GGUF; expected 2 or 3")


def _value_type(cursor: Cursor, what: str) -> GGUFValueType:
    start = cursor.pos
    number = cursor.u32(f"the type of {what}")
    if number not in _VALUE_TYPES:
        raise cursor.error(start, f"unknown value type {number} of {what}; expected 0 to {max(_VALUE_TYPES)}")
    return _VALUE_TYPES[number]


def _metadata_entry(cursor: Cursor, key: str, key_start: int) -> MetadataEntry:
    what = f"key {quoted(key)}"
    value_type = _value_type(cursor, what)
    if value_type == GGUFValueType.STRING:
        return MetadataEntry(cursor.string(what), value_type, None, key_start)
    if value_type != GGUFValueType.ARRAY:
        return MetadataEntry(_numbers(cursor, value_type, 1, what)[0].item(), value_type, None, key_start)
    element_start = cursor.pos
    element_type = _value_type(cursor, f"the elements of {what}")
    if element_type == GGUFValueType.ARRAY:
        raise cursor.error(element_start, f"{what} is a nested array (an array of arrays), which is not supported")
    if element_type == GGUFValueType.STRING:
        n_strings = cursor.count(f"elements of {what}", MAX_ARRAY_ELEMENTS, 8)
        return MetadataEntry(cursor.strings(n_strings, what), value_type, element_type, key_start)
    n = cursor.count(f"elements of {what}", MAX_ARRAY_ELEMENTS, _SCALAR_DTYPES[element_type].itemsize)
    return MetadataEntry(_numbers(cursor, element_type, n, what), value_type, element_type, key_start)


def _numbers(cursor: Cursor, value_type: GGUFValueType, n: int, what: str) -> np.ndarray:
    """Read `n` numbers or bools as a read-only array (n,)."""
    dtype = _SCALAR_DTYPES[value_type]
    start = cursor.pos
    stored = np.frombuffer(cursor.read(n * dtype.itemsize, f"the value of {what}"), dtype)
    if value_type != GGUFValueType.BOOL:
        return stored
    not_bool = np.flatnonzero(stored > 1)
    if not_bool.size:
        first = int(not_bool[0])
        raise cursor.error(start + first, f"{what} holds the bool value {stored[first]}; expected 0 or 1")
    return stored.view(np.bool_)


def _alignment(cursor: Cursor, entry: MetadataEntry | None) -> int:
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.type != GGUFValueType.UINT32:
        raise cursor.error(entry.offset, f"general.alignment is of type {entry.type_name}; expected uint32")
    alignment = int(entry.value)
    if alignment & (alignment - 1) or not 8 <= alignment <= MAX_ALIGNMENT:
        raise cursor.error(
            entry.offset, f"general.alignment is {alignment}; expected a power of two from 8 to {MAX_ALIGNMENT}"
        )
    return alignment


def _tensor_info(cursor: Cursor, index: int, alignment: int) -> TensorInfo:
    """One entry of the tensor index; its `offset` is still relative to the data section."""
    name = cursor.name(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    dims_start = cursor.pos
    n_dims = cursor.u32(f"the number of dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(dims_start, f"{what} has {n_dims} dimensions; expected 1 to {MAX_DIMS}")
    ne: list[int] = []  # ggml order: the row length first
    n_elements = 1
    for axis in range(n_dims):
        start = cursor.pos
        length = cursor.u64(f"dimension {axis} of {what}")
        if not 1 <= length <= INT64_MAX:
            raise cursor.error(start, f"dimension {axis} of {what} is {signed(length)}; expected 1 to {INT64_MAX}")
        n_elements *= length
        if n_elements > INT64_MAX:
            raise cursor.error(start, f"the number of elements of {what} wraps 64 bits: {[*ne, length]} in ggml order")
        ne.append(length)
    type_start = cursor.pos
    number = cursor.u32(f"the type of {what}")
    if number not in _TENSOR_TYPES:
        removed = " (removed from ggml)" if number in _REMOVED_TENSOR_TYPES else ""
        raise cursor.error(type_start, f"unknown tensor type {number}{removed} of {what}")
    tensor_type = _TENSOR_TYPES[number]
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if ne[0] % block_size:
        raise cursor.error(
            dims_start + 4,
            f"rows of {what} have {ne[0]} elements, not divisible by the block size {block_size} of {tensor_type.name}",
        )
    n_bytes = n_elements // block_size * block_bytes
    if n_bytes > INT64_MAX:
        raise cursor.error(dims_start + 4, f"the size of {what} wraps 64 bits: {n_bytes} bytes")
    offset_start = cursor.pos
    offset = cursor.u64(f"the offset of {what}")
    if offset % alignment:
        raise cursor.error(
            offset_start, f"the offset {offset} of {what} is misaligned; expected a multiple of {alignment}"
        )
    return TensorInfo(name, tensor_type, tuple(reversed(ne)), offset, n_bytes, shard=0)


def _check_extents(cursor: Cursor, tensors: tuple[TensorInfo, ...], info_offsets: dict[str, int]) -> None:
    """Raise GGUFError unless all data is inside the file and no byte belongs to two tensors."""
    for info in tensors:
        if info.offset + info.n_bytes > cursor.size:
            raise cursor.error(
                info_offsets[info.name],
                f"tensor {quoted(info.name)} lies beyond the file: bytes {info.offset} to "
                f"{info.offset + info.n_bytes}, but the file has {cursor.size}",
            )
    by_offset = sorted(tensors, key=lambda info: info.offset)
    for before, after in itertools.pairwise(by_offset):
        if before.offset + before.n_bytes > after.offset:
            raise cursor.error(
                info_offsets[after.name],
                f"tensors {quoted(before.name)} and {quoted(after.name)} overlap: bytes {before.offset} to "
                f"{before.offset + before.n_bytes} and from {after.offset}",
            )
