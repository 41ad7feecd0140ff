"""Model files for tests: a valid one read and written again with other keys or tensors, or cut into a split one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from refengine.gguf.file import GGUFFile
from tests.gguf_builder import ARRAY, U16, GGUFBuilder

ModelFiles = Callable[[str], Path]  # what the fixture `tiny_model` is

Pair = tuple[int, Any]  # value type and value; of an array (ARRAY, (element type, values))
TensorData = tuple[tuple[int, ...], int, bytes]  # shape in NumPy order, tensor type, data


def float_bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def read_floats(path: Path, name: str) -> np.ndarray:
    """A float32 tensor of a file, as a copy."""
    with GGUFFile(path) as gguf:
        return gguf.data(name).view("<f4").reshape(gguf.tensors[name].shape).copy()


def add_pair(builder: GGUFBuilder, key: str, pair: Pair) -> None:
    value_type, value = pair
    if value_type == ARRAY:
        builder.array(key, *value)
    else:
        builder.pair(key, value_type, value)


def rewrite(
    source: Path,
    target: Path,
    *,
    keys: Mapping[str, Pair | None] | None = None,
    tensors: Mapping[str, TensorData | None] | None = None,
) -> Path:
    """Write `source` again as `target`; keys and tensors replace those of that name, join the others, or (None) go."""
    with GGUFFile(source) as gguf:
        all_keys = {key: _pair(gguf, key) for key in gguf.metadata} | dict(keys or {})
        all_tensors = {name: _tensor(gguf, name) for name in gguf.tensors} | dict(tensors or {})
    builder = GGUFBuilder()
    for key, pair in all_keys.items():
        if pair is not None:
            add_pair(builder, key, pair)
    for name, tensor in all_tensors.items():
        if tensor is not None:
            builder.tensor(name, *tensor)
    return builder.write(target)


def split(source: Path, folder: Path, first_names: set[str]) -> Path:
    """Cut `source` into two files, the tensors of `first_names` in the first; returns the first's path."""
    with GGUFFile(source) as gguf:
        pairs = {key: _pair(gguf, key) for key in gguf.metadata}
        tensors = {name: _tensor(gguf, name) for name in gguf.tensors}
    paths = [folder / f"{source.stem}-0000{i}-of-00002.gguf" for i in (1, 2)]
    for number, path in enumerate(paths):
        builder = GGUFBuilder()
        for key, pair in pairs.items() if number == 0 else ():
            add_pair(builder, key, pair)
        builder.pair("split.no", U16, number).pair("split.count", U16, 2)
        builder.pair("split.tensors.count", int(GGUFValueType.INT32), len(tensors))
        for name, tensor in tensors.items():
            if (name in first_names) == (number == 0):
                builder.tensor(name, *tensor)
        builder.write(path)
    return paths[0]


def _pair(gguf: GGUFFile, key: str) -> Pair:
    name, value = gguf.type_name(key), gguf.metadata[key]
    if name.startswith("array of "):
        return ARRAY, (int(GGUFValueType[name.removeprefix("array of ").upper()]), list(value))
    return int(GGUFValueType[name.upper()]), value


def _tensor(gguf: GGUFFile, name: str) -> TensorData:
    info = gguf.tensors[name]
    return info.shape, int(info.type), gguf.data(name).tobytes()


def zeros_of(dtype: Any) -> Callable[[int, tuple[int, ...]], list[np.ndarray]]:
    """The arrays of a KVCache, of any type."""
    return lambda n, shape: [np.zeros(shape, dtype) for _ in range(n)]
