"""Dumps: intermediate tensors of any engine, in a folder that any engine can write.

The folder has `manifest.json` and data files. The manifest is one JSON object:

    format        "refengine-dump"               format_version   1
    engine        free text: name and version    ids              token ids of the prompt, one sequence from position 0
    model_sha256  of the GGUF file, or null      numerics, flags  free: information about the run for the reader
    axis_order    "numpy" (slowest axis first) or "ggml" (`ne`: fastest first); default "numpy"
    complete      false while the writer is still writing (default true)
    tensors       a list of objects:
        name        llama.cpp's: "Qcur", "l_out", "result_norm"; "result_output" are the logits
        layer       number, or null for tensors outside the layers
        occurrence  number for an earlier one of several tensors with this name (Qcur: 0 the product, 1 with its
                    bias), null for the last (after RoPE)
        shape       list of lengths, in the manifest's axis order (or the tensor's own `axis_order`)
        dtype       "f32", "f16", "bf16", "f64", "i32" or "i64"
        file        data file in the same folder: raw little-endian ".bin" (with `offset` in bytes, default 0), ".npy",
                    or ".safetensors" (with `key`, default the full name)

`Qcur-3#0` is the full name of tensor Qcur, layer 3, occurrence 0. `refengine_dump.h`, beside this file, writes this
format from C++.
A dump comes from another program, so every path, size and type in it is checked before it is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from refengine.errors import DumpError, one_line
from refengine.trace import tensor_name
from refengine.validate.capture import Capture

FORMAT, FORMAT_VERSION = "refengine-dump", 1
_DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2", "f64": "<f8", "i32": "<i4", "i64": "<i8"}
_NAMES = {"float32": "f32", "float16": "f16", "float64": "f64", "int32": "i32", "int64": "i64"}
_MAX_MANIFEST = 256 << 20  # bytes; a manifest of a million tensors is smaller


@dataclass(frozen=True)
class NameMap:
    """Maps another engine's tensor names to llama.cpp's, by the first rule whose expression matches the whole name.

    Read from a YAML or JSON list of [expression, replacement]. `\\1` in the replacement is the first group; a null
    replacement omits the tensor. A name without a matching rule is unchanged.
    """

    rules: tuple[tuple[re.Pattern[str], str | None], ...] = ()

    @staticmethod
    def read(path: str | Path) -> NameMap:
        """Read a name map. Raises DumpError if the file is not such a list, or an expression is invalid."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise DumpError(f"{path}: neither YAML nor JSON: {e}") from None
        rules = []
        for i, rule in enumerate(content if isinstance(content, list) else [None]):
            match rule:
                case [str() as expression, (str() | None) as replacement]:
                    try:
                        compiled = re.compile(expression)
                        if replacement is not None:  # raises at once for a group that does not exist
                            compiled.sub(replacement, "")
                    except (re.error, IndexError) as e:
                        raise DumpError(f"{path}: rule {i}: {expression!r} → {replacement!r}: {e}") from None
                    rules.append((compiled, replacement))
                case _:
                    raise DumpError(f"{path}: rule {i} must be [expression, replacement or null], found {rule!r}")
        return NameMap(tuple(rules))

    def __call__(self, name: str) -> str | None:
        """llama.cpp's name for a tensor; None to omit the tensor."""
        for expression, replacement in self.rules:
            match = expression.fullmatch(name)
            if match:
                return None if replacement is None else match.expand(replacement)
        return name


def read_dump(path: str | Path, names: NameMap | None = None) -> Capture:
    """Read a dump, given by its folder or its manifest (with any file name). Raw files are mapped, not loaded.

    Raises DumpError, which names the entry, for anything missing, malformed or outside the folder.
    """
    manifest = Path(path) / "manifest.json" if Path(path).is_dir() else Path(path)
    reader = _Reader(manifest, names or NameMap())
    return reader.read()


class _Reader:
    def __init__(self, manifest: Path, names: NameMap) -> None:
        self.path, self.folder, self.names = manifest, manifest.parent, names
        try:
            if manifest.stat().st_size > _MAX_MANIFEST:
                raise DumpError(f"{manifest}: larger than the limit of {_MAX_MANIFEST >> 20} MiB for a manifest")
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except OSError as e:
            raise DumpError(f"{manifest}: {e.strerror}; a dump is a folder with manifest.json") from None
        except (ValueError, RecursionError) as e:
            raise DumpError(f"{manifest}: not JSON: {e}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DumpError(f'{manifest}: not a dump: expected "format": "{FORMAT}"')
        if content.get("format_version") != FORMAT_VERSION:
            raise DumpError(
                f"{manifest}: format_version is {content.get('format_version')!r}; this version reads {FORMAT_VERSION}"
            )
        self.content: dict[str, Any] = content

    def read(self) -> Capture:
        ids = self._field(self.content, "ids", list, "manifest")
        if any(type(i) is not int or i < 0 for i in ids):
            raise DumpError(f"{self.path}: ids must be token ids, integers from 0")
        tensors: dict[str, np.ndarray] = {}
        for number, entry in enumerate(self._field(self.content, "tensors", list, "manifest")):
            where = f"tensor entry {number}"
            if not isinstance(entry, dict):
                raise DumpError(f"{self.path}: {where} is not an object")
            name = self.names(self._full_name(entry, where))
            if name is None:
                continue
            if name in tensors:
                raise DumpError(f"{self.path}: {where}: tensor {name} occurs twice")
            tensors[name] = self._tensor(entry, name)
        sha256 = self._field(self.content, "model_sha256", (str, type(None)), "manifest", None)
        return Capture(
            source=self.path,
            engine=one_line(self._field(self.content, "engine", str, "manifest")),
            ids=ids,
            tensors=tensors,
            model_sha256=sha256.lower() if sha256 else None,
            numerics=self._field(self.content, "numerics", str, "manifest", ""),
            flags=self._field(self.content, "flags", dict, "manifest", {}),
            complete=self._field(self.content, "complete", bool, "manifest", True),
        )

    def _field(self, table: dict[str, Any], key: str, kind: Any, where: str, default: Any = ...) -> Any:
        if key not in table and default is not ...:
            return default
        value = table.get(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise DumpError(f"{self.path}: {where}: {key!r} must be {expected}, found {value!r:.80}")
        return value

    def _full_name(self, entry: dict[str, Any], where: str) -> str:
        name = self._field(entry, "name", str, where)
        if not name or not name.isprintable():
            raise DumpError(f"{self.path}: {where}: name {name!r:.80} must be printable characters")
        layer = self._field(entry, "layer", (int, type(None)), where, None)
        occurrence = self._field(entry, "occurrence", (int, type(None)), where, None)
        return tensor_name(name, layer, occurrence)

    def _tensor(self, entry: dict[str, Any], name: str) -> np.ndarray:
        where = f"tensor {name}"
        shape = self._field(entry, "shape", list, where)
        if any(type(n) is not int or n < 0 for n in shape):
            raise DumpError(f"{self.path}: {where}: shape {shape!r:.80} must be a list of lengths from 0")
        dtype = self._field(entry, "dtype", str, where)
        if dtype not in _DTYPES:
            raise DumpError(f"{self.path}: {where}: unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
        order = self._field(entry, "axis_order", str, where, self.content.get("axis_order", "numpy"))
        if order not in ("numpy", "ggml"):
            raise DumpError(f"{self.path}: {where}: axis_order {order!r} must be 'numpy' or 'ggml'")
        in_numpy = tuple(shape if order == "numpy" else reversed(shape))
        file = self._file(entry, where)
        if file.suffix == ".bin":
            value = self._raw(entry, file, in_numpy, np.dtype(_DTYPES[dtype]), where)
        else:
            value = self._loaded(entry, file, name, where)
            if value.shape != in_numpy:
                raise DumpError(f"{self.path}: {where}: {file.name} has shape {value.shape}, not {in_numpy}")
        return _bf16(value) if dtype == "bf16" and value.dtype == np.uint16 else value

    def _file(self, entry: dict[str, Any], where: str) -> Path:
        file: Path = self.folder / self._field(entry, "file", str, where)
        if not file.resolve().is_relative_to(self.folder.resolve()):
            raise DumpError(f"{self.path}: {where}: file {entry['file']!r} is outside the dump's folder")
        if not file.is_file():
            raise DumpError(f"{self.path}: {where}: there is no file {entry['file']!r} in the dump's folder")
        if file.suffix not in (".bin", ".npy", ".safetensors"):
            raise DumpError(f"{self.path}: {where}: file {entry['file']!r} is neither .bin, .npy nor .safetensors")
        return file

    def _raw(
        self, entry: dict[str, Any], file: Path, shape: tuple[int, ...], dtype: np.dtype, where: str
    ) -> np.ndarray:
        offset = self._field(entry, "offset", int, where, 0)
        n_bytes, size = math.prod(shape) * dtype.itemsize, file.stat().st_size
        if offset < 0 or offset + n_bytes > size:
            raise DumpError(
                f"{self.path}: {where}: {n_bytes} bytes at {offset} do not fit {file.name}, which has {size}"
            )
        if n_bytes == 0:
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, mode="r", offset=offset, shape=shape)

    def _loaded(self, entry: dict[str, Any], file: Path, name: str, where: str) -> np.ndarray:
        try:
            if file.suffix == ".npy":
                array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
                return array
            with safe_open(file, framework="numpy") as opened:
                return np.asarray(opened.get_tensor(self._field(entry, "key", str, where, name)))
        except (SafetensorError, ValueError, OSError, TypeError) as e:
            raise DumpError(f"{self.path}: {where}: {file.name}: {e}") from None


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def manifest_of(
    engine: str,
    ids: Sequence[int],
    tensors: Mapping[str, np.ndarray],
    file: str,
    *,
    model_sha256: str | None = None,
    numerics: str = "",
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of tensors that are stored in one .safetensors file under their full names."""
    entries = []
    for full, value in tensors.items():
        base, _, occurrence = full.partition("#")
        name, _, layer = base.rpartition("-")
        is_layers = bool(name) and layer.isdecimal()
        entries.append(
            {
                "name": name if is_layers else base,
                "layer": int(layer) if is_layers else None,
                "occurrence": int(occurrence) if occurrence else None,
                "shape": list(value.shape),
                "dtype": _NAMES[value.dtype.name],
                "file": file,
                "key": full,
            }
        )
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "engine": engine,
        "model_sha256": model_sha256,
        "ids": [int(i) for i in ids],
        "numerics": numerics,
        "flags": dict(flags or {}),
        "axis_order": "numpy",
        "tensors": entries,
    }
