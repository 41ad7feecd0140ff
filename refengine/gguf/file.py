"""A GGUF model file, or all files of a split one, as checked metadata and tensor index.

Opens, maps and checks files (`parse.py`, `split.py`), and gives typed access to metadata and views of tensor data.
Independent of devices, architectures and quantisation arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import numpy as np
from gguf import GGUFValueType

from refengine.errors import GGUFError
from refengine.gguf.cursor import OpenFile, malformed, quoted
from refengine.gguf.parse import INTEGER_TYPES, METADATA_START, MetadataEntry, Shard, TensorInfo
from refengine.gguf.split import open_all

__all__ = ["REQUIRED", "GGUFFile", "TensorInfo", "Unread"]

T = TypeVar("T")
D = TypeVar("D")


class _Required:
    """Marks a key without a default, which must exist."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()

_FLOAT_TYPES = frozenset({GGUFValueType.FLOAT32, GGUFValueType.FLOAT64})
_BOOL_TYPES = frozenset({GGUFValueType.BOOL})
_STRING_TYPES = frozenset({GGUFValueType.STRING})
_SCALAR_KINDS: dict[Any, frozenset[GGUFValueType]] = {
    int: INTEGER_TYPES,
    float: _FLOAT_TYPES,
    bool: _BOOL_TYPES,
    str: _STRING_TYPES,
}
_ARRAY_KINDS: dict[Any, frozenset[GGUFValueType]] = {
    "ints": INTEGER_TYPES,
    "floats": _FLOAT_TYPES,
    "bools": _BOOL_TYPES,
    "strs": _STRING_TYPES,
}


class Unread:
    """Bytes (n,) u8 of an open file, not read yet; nor are slices of it. `np.asarray` reads them into new memory.

    Reading raises GGUFError, with the place and both numbers of bytes, if the file has become shorter.
    """

    def __init__(self, file: OpenFile, what: str, offset: int, n_bytes: int) -> None:
        self._file, self._what, self._offset = file, what, offset
        self.shape, self.nbytes = (n_bytes,), n_bytes

    def __getitem__(self, part: slice) -> Unread:
        start, stop, step = part.indices(self.nbytes)
        assert step == 1
        return Unread(self._file, self._what, self._offset + start, max(0, stop - start))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        content = np.empty(self.shape, np.uint8)
        self._file.read_into(content.data, self._offset, self._what)
        return content


class GGUFFile:
    """One model: the metadata and tensors of a GGUF file, or of all files of a split model.

    Opening maps the file and checks everything except the values of the weights. Anything malformed raises GGUFError,
    whose message begins with the path of the file and ends with the byte offset.

    While views from `data` are in use, the file must not shrink: accessing a lost page kills the process (SIGBUS).
    `unread` does not have this problem.
    """

    path: Path  # as given
    paths: tuple[Path, ...]  # all files, in the order of their split numbers
    version: int  # of the first file: 2 or 3
    alignment: int  # of the first file
    file_size: int  # bytes, all files together
    metadata: dict[str, Any]  # of the first file: int, float, bool, str, list[str], or a read-only array (n,)
    tensors: dict[str, TensorInfo]  # in file order

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        shards = open_all(self.path)
        self._shards: tuple[Shard, ...] | None = shards
        self._entries: dict[str, MetadataEntry] = shards[0].entries
        self._info_offsets = {name: offset for shard in shards for name, offset in shard.tensor_info_offsets.items()}
        self.paths = tuple(shard.path for shard in shards)
        self.version = shards[0].version
        self.alignment = shards[0].alignment
        self.file_size = sum(shard.file.size for shard in shards)
        self.metadata = {key: entry.value for key, entry in self._entries.items()}
        self.tensors = {
            info.name: replace(info, shard=index) for index, shard in enumerate(shards) for info in shard.tensors
        }

    @overload
    def get(self, key: str, kind: type[T], default: _Required = ...) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    @overload
    def get(self, key: str, kind: Literal["strs"], default: _Required = ...) -> list[str]: ...
    @overload
    def get(self, key: str, kind: Literal["strs"], default: D) -> list[str] | D: ...
    @overload
    def get(self, key: str, kind: Literal["ints", "floats", "bools"], default: _Required = ...) -> np.ndarray: ...
    @overload
    def get(self, key: str, kind: Literal["ints", "floats", "bools"], default: D) -> np.ndarray | D: ...

    def get(self, key: str, kind: Any, default: Any = REQUIRED) -> Any:
        """The value of `key`. kind: int, float, bool or str, or for arrays "ints", "floats", "bools" or "strs".

        int accepts every integer type but not bool; float accepts float32 and float64 but not integers (llama.cpp is as
        strict about floats, and stricter about integers). Arrays are (n,) and read-only; their dtype is the file's.
        Raises GGUFError if the key is missing and no default is given, or if it has another type.
        """
        entry = self._entries.get(key)
        if entry is None:
            if default is not REQUIRED:
                return default
            raise self.error(key, f"required key {quoted(key)} is missing; expected {_kind_name(kind)}")
        kinds, found = (_SCALAR_KINDS, entry.type) if entry.element_type is None else (_ARRAY_KINDS, entry.element_type)
        if found not in kinds.get(kind, ()):
            raise self.error(key, f"key {quoted(key)} is of type {entry.type_name}; expected {_kind_name(kind)}")
        return entry.value

    def type_name(self, key: str) -> str:
        """The type of a key in the file: `uint32`, `string`, `array of float32`, ... KeyError if it is missing."""
        return self._entries[key].type_name

    def error(self, key: str, message: str) -> GGUFError:
        """An error about the value of `key`, with the file and the key's byte offset.

        For a missing key, the offset is that of the first key.
        """
        entry = self._entries.get(key)
        return malformed(self.paths[0], METADATA_START if entry is None else entry.offset, message)

    def tensor_error(self, name: str, message: str) -> GGUFError:
        """An error about tensor `name`, with its file and the offset of its index entry. KeyError for another name."""
        return malformed(self.paths[self.tensors[name].shard], self._info_offsets[name], message)

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, (n_bytes,) u8: a read-only view of the mapping, without a copy.

        Raises GGUFError if there is no such tensor, ValueError if the file is closed.
        """
        file, info = self._place(name)
        return np.frombuffer(file.map, np.uint8, info.n_bytes, info.offset)

    def unread(self, name: str) -> Unread:
        """The bytes of a tensor, to be read into new memory later. Raises the errors of `data`."""
        file, info = self._place(name)
        return Unread(file, f"tensor {quoted(name)}", info.offset, info.n_bytes)

    def _place(self, name: str) -> tuple[OpenFile, TensorInfo]:
        if self._shards is None:
            raise ValueError(f"{self.path}: the file is closed")
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: there is no tensor {quoted(name)} among the file's {len(self.tensors)}")
        info = self.tensors[name]
        return self._shards[info.shard].file, info

    def close(self) -> None:
        """Close the files; may be called twice.

        Arrays from `data` stay valid: the mapping exists until the last of them is deleted.
        Metadata and the tensor index stay usable.
        """
        for shard in self._shards or ():
            shard.file.close()
        self._shards = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"


def _kind_name(kind: Any) -> str:
    return f"array of {kind}" if isinstance(kind, str) else str(kind.__name__)
