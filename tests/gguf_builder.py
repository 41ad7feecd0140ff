"""A byte-level GGUF writer for tests, independent of refengine and of the `gguf` package.

Writes what it is told, malformed or not, and remembers where each field landed, so that a test can patch a field and
expect its byte offset in the error. Layout: the GGUF specification (ggml `docs/gguf.md`).
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # metadata value types
SCALAR_FORMATS = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIifBQqd", strict=True))
TENSOR_F32, TENSOR_F16, TENSOR_Q4_0, TENSOR_Q8_0, TENSOR_Q4_K, TENSOR_MXFP4 = 0, 1, 2, 8, 12, 39
BLOCKS = {  # tensor type -> (elements, bytes) of a block
    TENSOR_F32: (1, 4),
    TENSOR_F16: (1, 2),
    TENSOR_Q4_0: (32, 18),
    TENSOR_Q8_0: (32, 34),
    TENSOR_Q4_K: (256, 144),
    TENSOR_MXFP4: (32, 17),
}


def pack_string(text: str | bytes) -> bytes:
    """Length and bytes; give bytes to write what is not valid UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value_type: int, value: Any) -> bytes:
    """One scalar or string, without its type."""
    return pack_string(value) if value_type == STRING else struct.pack("<" + SCALAR_FORMATS[value_type], value)


def patched(raw: bytes, offset: int, fmt: str, *values: Any) -> bytes:
    """`raw` with the fields at `offset` overwritten, little-endian."""
    new = struct.pack("<" + fmt, *values)
    assert offset + len(new) <= len(raw)
    return raw[:offset] + new + raw[offset + len(new) :]


def counting_bytes(n: int, start: int = 0) -> bytes:
    """`n` bytes that tell their position, so that a view at the wrong place is noticed."""
    return bytes((start + i) % 251 for i in range(n))


class GGUFBuilder:
    """Collects pairs and tensors; `build()` returns the file's bytes and fills `at`.

    `at` maps field names to byte offsets: "version", "n_tensors", "n_keys"; `key:K` (the pair), `value:K` (behind its
    type), `type:K`; `tensor:N` (the index entry), `dims:N` (their number), `ne:N`, `dtype:N`, `offset:N`, `data:N`.
    The second of two pairs or tensors of one name is marked `#2`.
    """

    def __init__(self, version: int = 3, alignment: int = 32) -> None:
        self.version = version
        self.alignment = alignment  # of the data; write the key `general.alignment` yourself
        self.at: dict[str, int] = {}
        self._pairs: list[tuple[str | bytes, bytes, bytes]] = []  # key, type, value
        self._tensors: list[tuple[str | bytes, tuple[int, ...], int, bytes, int | None, int | None]] = []

    def pair(self, key: str | bytes, value_type: int, value: Any) -> Self:
        """A scalar or a string."""
        return self.raw_pair(key, value_type, pack_value(value_type, value))

    def array(self, key: str | bytes, element_type: int, values: Sequence[Any]) -> Self:
        head = struct.pack("<IQ", element_type, len(values))
        return self.raw_pair(key, ARRAY, head + b"".join(pack_value(element_type, v) for v in values))

    def raw_pair(self, key: str | bytes, value_type: int, value: bytes) -> Self:
        """Any type number, any bytes as the value."""
        self._pairs.append((key, struct.pack("<I", value_type), value))
        return self

    def tensor(
        self,
        name: str | bytes,
        shape: Sequence[int],
        tensor_type: int = TENSOR_F32,
        data: bytes | None = None,
        *,
        offset: int | None = None,
        n_dims: int | None = None,
    ) -> Self:
        """`shape` in NumPy order; data defaults to counting bytes of the right size, `offset` to behind the last."""
        ne = tuple(reversed(shape))
        if data is None:
            elements, n_bytes = BLOCKS.get(tensor_type, (1, 1))
            n_elements = 1
            for length in ne:
                n_elements *= length
            data = counting_bytes(max(0, min(n_elements // elements * n_bytes, 1 << 16)), start=len(self._tensors) * 7)
        self._tensors.append((name, ne, tensor_type, data, offset, n_dims))
        return self

    def build(self, *, n_tensors: int | None = None, n_keys: int | None = None, magic: bytes = b"GGUF") -> bytes:
        """The file; counts may lie."""
        out = bytearray(magic)
        self.at = {"version": len(out)}
        out += struct.pack("<I", self.version)
        self.at["n_tensors"] = len(out)
        out += struct.pack("<Q", len(self._tensors) if n_tensors is None else n_tensors)
        self.at["n_keys"] = len(out)
        out += struct.pack("<Q", len(self._pairs) if n_keys is None else n_keys)
        for key, value_type, value in self._pairs:
            self._mark("key", key, out)
            out += pack_string(key)
            self._mark("type", key, out)
            out += value_type
            self._mark("value", key, out)
            out += value
        section = bytearray()
        for name, ne, tensor_type, data, offset, n_dims in self._tensors:
            self._mark("tensor", name, out)
            out += pack_string(name)
            self._mark("dims", name, out)
            out += struct.pack("<I", len(ne) if n_dims is None else n_dims)
            self._mark("ne", name, out)
            out += b"".join(struct.pack("<Q", length % (1 << 64)) for length in ne)
            self._mark("dtype", name, out)
            out += struct.pack("<I", tensor_type)
            self._mark("offset", name, out)
            section += bytes(-len(section) % self.alignment)
            self.at[f"data:{_text(name)}"] = len(section) if offset is None else offset
            out += struct.pack("<Q", self.at[f"data:{_text(name)}"])
            section += data
        out += bytes(-len(out) % self.alignment)
        for name, *_ in self._tensors:
            self.at[f"data:{_text(name)}"] += len(out)
        return bytes(out + section)

    def write(self, path: Path, **lies: Any) -> Path:
        path.write_bytes(self.build(**lies))
        return path

    def _mark(self, field: str, name: str | bytes, out: bytearray) -> None:
        label = f"{field}:{_text(name)}"
        self.at[f"{label}#2" if label in self.at else label] = len(out)


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode(errors="replace")


def tiny_builder(version: int = 3) -> GGUFBuilder:
    """A small valid file: every value type alone and in an array, tensors of 1 to 4 dimensions and several types."""
    builder = GGUFBuilder(version)
    builder.pair("general.architecture", STRING, "tiny")
    builder.pair("general.alignment", U32, 32)
    builder.pair("t.u8", U8, 200).pair("t.i8", I8, -100).pair("t.u16", U16, 60_000).pair("t.i16", I16, -30_000)
    builder.pair("t.u32", U32, 4_000_000_000).pair("t.i32", I32, -2_000_000_000)
    builder.pair("t.u64", U64, (1 << 64) - 3).pair("t.i64", I64, -(1 << 62))
    builder.pair("t.f32", F32, 0.15625).pair("t.f64", F64, 0.1)
    builder.pair("t.true", BOOL, 1).pair("t.false", BOOL, 0).pair("t.empty", STRING, "")
    builder.array("a.u8", U8, [0, 255]).array("a.i8", I8, [-128, 127, 5]).array("a.u16", U16, [65535])
    builder.array("a.i16", I16, [-32768, 32767]).array("a.u32", U32, [4_294_967_295, 1])
    builder.array("a.i32", I32, [-2_147_483_648, 7]).array("a.u64", U64, [(1 << 64) - 1]).array("a.i64", I64, [-1, 2])
    builder.array("a.f32", F32, [0.5, -0.25, 3.0]).array("a.f64", F64, [0.1, 1e300])
    builder.array("a.bool", BOOL, [1, 0, 1]).array("a.none", I32, [])
    builder.array("a.str", STRING, ["", "a", "é", "語", "🦙", "zero\0inside"])
    builder.tensor("vector", [5])
    builder.tensor("matrix", [3, 64], TENSOR_Q8_0)
    builder.tensor("cube.weight", [2, 3, 32], TENSOR_MXFP4)
    builder.tensor("deep", [2, 1, 3, 4], TENSOR_F16)
    return builder
