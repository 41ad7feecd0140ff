"""A model's tensors on a device, accessed by their GGUF names.

`blk.3.attn_q.weight` is `weights.layers[3].attn_q`, its bias is `weights.layers[3].attn_q_bias`, and
`token_embd.weight` is `weights.token_embd`. Matrices stay as the file stores them (`Matrix`: raw blocks, type,
shape); vectors (norms, biases, sinks, RoPE factors) are float32 arrays. Every architecture declares its
tensors (`tensors(cfg)` in its model file); a missing or additional tensor, or one of another shape, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.array import Array
from refengine.errors import ModelError
from refengine.gguf.file import GGUFFile, TensorInfo, Unread

CHUNK_BYTES = 1 << 20  # size of one copy to a GPU; W-1222


@dataclass(frozen=True)
class TensorSpec:
    """What an architecture expects of one tensor. shape: in NumPy order. optional: the tensor may be absent."""

    shape: tuple[int, ...]
    optional: bool = False
    same_as: str | None = None  # the tensor to use if this one is absent (tied embedding)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix as stored: `data` has `shape[-1] // block_size` blocks per row, row after row.

    shape: (n_out, n_in), or (n_expert, n_out, n_in) for the matrices of a mixture of experts.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Array | Unread  # uint8, (n_bytes,)

    def rows(self, start: int, stop: int) -> Array | Unread:
        """A view of the raw bytes of rows start..stop, counted over all experts."""
        row_bytes = self.data.shape[0] // int(np.prod(self.shape[:-1]))
        return self.data[start * row_bytes : stop * row_bytes]


class Layer:
    """The tensors of one layer, as attributes under their GGUF names without `blk.N.` and `.weight`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(vars(self)))
        raise AttributeError(f"no tensor {name} is declared for a layer of this model; tensors(cfg) declares {known}")


class Weights:
    """All tensors of a model. Attributes are GGUF names; `layers` is a list with one `Layer` per layer."""

    def __init__(self, tensors: Mapping[str, Matrix | Array | None], n_layer: int) -> None:
        self.layers = [Layer() for _ in range(n_layer)]
        self.n_bytes = 0  # bytes of all tensors on the device
        for name, value in tensors.items():
            owner, attribute = self._place(name)
            setattr(owner, attribute, value)

    def _place(self, name: str) -> tuple[Any, str]:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z0-9_]+)\.(weight|bias)", name)
        assert match is not None, name
        owner = self if match[1] is None else self.layers[int(match[1])]
        return owner, match[2] + ("_bias" if match[3] == "bias" else "")

    def products(self) -> list[Matrix]:
        """The matrices that a forward pass multiplies with, each once: first those of the layers, then the others.

        An embedding (`token_embd`, `position_embd`) is not among them unless it is also the output matrix.
        """
        owners: list[Any] = [*self.layers, self]
        matrices = [v for o in owners for k, v in vars(o).items() if isinstance(v, Matrix) and not k.endswith("_embd")]
        return list({w.name: w for w in matrices}.values())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no tensor {name} is declared for this model by tensors(cfg)")


class Placement(Protocol):
    """Puts tensors on a device. in_place: whether matrices stay views of the file."""

    in_place: bool

    def matrix(self, w: Matrix, done: Callable[[int], None]) -> Any:
        """Put a matrix, which may not be read yet, on the device. Calls done(n) after each part of n bytes."""

    def vector(self, values: np.ndarray) -> Array:
        """Put a float32 vector on the device."""


class ArrayPlacement:
    """Keeps matrices as stored, in NumPy arrays (views of the mapped file, or copies if `copied`) or CuPy arrays."""

    def __init__(self, xp: Any, copied: bool = False, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.in_place = xp is np and not copied
        self._xp, self._chunk = xp, chunk_bytes

    def matrix(self, w: Matrix, done: Callable[[int], None]) -> Matrix:
        placed = replace(w, data=read(self._xp, w.data, self._chunk))
        done(w.data.nbytes)
        return placed

    def vector(self, values: np.ndarray) -> Array:
        return self._xp.asarray(values)


def read(xp: Any, stored: Array | Unread, chunk_bytes: int = CHUNK_BYTES) -> Array:
    """Stored bytes (n,) as an array of `xp`. Copying to a GPU uses at most `chunk_bytes` of host memory."""
    if xp is np:
        return np.asarray(stored)
    result = xp.empty(stored.shape, np.uint8)
    for start in range(0, stored.nbytes, chunk_bytes):
        result[start : start + chunk_bytes].set(np.asarray(stored[start : start + chunk_bytes]))
    return result


def load_weights(
    gguf: GGUFFile,
    specs: Mapping[str, TensorSpec],
    n_layer: int,
    place: Placement,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Check the file's tensors against `specs`, then put them on the device with `place`.

    progress(bytes_done, bytes_total) is called after each tensor, and after parts of a large one.
    Raises `ModelError` for a missing, unexpected or wrongly shaped tensor or an unsupported type, before any is loaded;
    `GGUFError` if the file has become shorter, unless tensors stay in place.
    """
    check_tensors(gguf, specs)
    total = sum(info.n_bytes for info in gguf.tensors.values())
    loaded: dict[str, Matrix | Array | None] = {}
    n_done = 0

    def done(n_bytes: int) -> None:
        nonlocal n_done
        n_done += n_bytes
        if progress is not None:
            progress(n_done, total)

    for name, info in gguf.tensors.items():
        stored = gguf.data(name) if place.in_place else gguf.unread(name)
        if is_vector(info):
            loaded[name] = place.vector(quants.dequantize(np, np.asarray(stored), info.type, info.shape))
            done(info.n_bytes)
        else:
            loaded[name] = place.matrix(Matrix(name, info.type, info.shape, stored), done)
    for name, spec in specs.items():
        if name not in loaded:
            loaded[name] = loaded[spec.same_as] if spec.same_as else None
    weights = Weights(loaded, n_layer)
    weights.n_bytes = total
    return weights


def check_tensors(gguf: GGUFFile, specs: Mapping[str, TensorSpec]) -> None:
    """Raise `ModelError` for missing, unexpected, wrongly shaped or unsupported tensors; it names a few of each."""
    missing = [n for n, s in specs.items() if not s.optional and n not in gguf.tensors]
    unexpected = [n for n in gguf.tensors if n not in specs]
    wrong = [
        f"{name}: shape {_dims(info.shape)}, expected {_dims(specs[name].shape)}"
        for name, info in gguf.tensors.items()
        if name in specs and info.shape != specs[name].shape
    ]
    problems = [*_listed("missing", missing), *_listed("unexpected", unexpected), *_listed("wrongly shaped", wrong)]
    if problems:
        arch = gguf.metadata.get("general.architecture")
        raise ModelError(f"{gguf.path}: tensors do not fit architecture {arch!r}: {'; '.join(problems)}")
    for name, info in gguf.tensors.items():
        quants.require_supported(info.type, f"{gguf.path}: tensor {name}")
        if len(info.shape) == 1 and info.type not in _VECTOR_TYPES:
            raise ModelError(f"{gguf.path}: vector {name} has type {info.type.name}; expected F32, F16 or BF16")


_VECTOR_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def is_vector(info: TensorInfo) -> bool:
    """Whether a tensor is kept as float32: vectors, and the small bias tables of experts."""
    return len(info.shape) == 1 or info.name.endswith(".bias")


def _listed(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"{what} {', '.join(names[:4])}{more}"


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def quant_kind(gguf: GGUFFile) -> str:
    """The usual name of the file's quantisation: `Q4_K_M`, `MXFP4`, `F32`…

    Read from `general.file_type` (llama.cpp's `llama_ftype`); without it, the tensor type with the most bytes.
    """
    from gguf import LlamaFileType  # not at the top: only a few commands need it

    value = gguf.metadata.get("general.file_type")
    if isinstance(value, int) and value in {int(t) for t in LlamaFileType} and value != int(LlamaFileType.GUESSED):
        name = LlamaFileType(value).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_").removesuffix("_MOE")
    by_type: dict[str, int] = {}
    for info in gguf.tensors.values():
        by_type[info.type.name] = by_type.get(info.type.name, 0) + info.n_bytes
    return max(by_type, key=lambda name: by_type[name]) if by_type else "none"
