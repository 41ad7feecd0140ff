"""ggml's own quantisation functions, reached with ctypes through the libraries that llama-cpp-python installs.

`load()` returns a `Ggml`, or skips the calling test where llama-cpp-python is missing. Struct layouts are those of
ggml.h (`ggml_type_traits`) and ggml-cpu.h (`ggml_type_traits_cpu`).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_VEC_DOT = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
)


class TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", _TO_FLOAT),
    ]


class TypeTraitsCpu(ctypes.Structure):
    _fields_ = [
        ("from_float", _TO_FLOAT),
        ("vec_dot", _VEC_DOT),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


class Ggml:
    """Type traits by ggml type; arrays in, arrays out."""

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        base.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        base.ggml_get_type_traits.argtypes = [ctypes.c_int]
        cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(TypeTraitsCpu)
        cpu.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
        cpu.ggml_cpu_init()  # fills the float16 tables that the scalar paths read
        self._base, self._cpu = base, cpu

    def traits(self, type_: GGMLQuantizationType) -> TypeTraits:
        return self._base.ggml_get_type_traits(int(type_)).contents

    def traits_cpu(self, type_: GGMLQuantizationType) -> TypeTraitsCpu:
        return self._cpu.ggml_get_type_traits_cpu(int(type_)).contents

    def to_float(self, type_: GGMLQuantizationType, raw: np.ndarray) -> np.ndarray:
        """Bytes of whole blocks -> (n,) f32. F32 has no conversion in ggml: its bytes are the values."""
        block_size, block_bytes = GGML_QUANT_SIZES[type_]
        data = np.ascontiguousarray(raw)
        if type_ == GGMLQuantizationType.F32:
            return data.view(np.float32)
        out = np.empty(data.size // block_bytes * block_size, dtype=np.float32)
        self.traits(type_).to_float(data.ctypes.data, out.ctypes.data, out.size)
        return out

    def from_float(self, type_: GGMLQuantizationType, row: np.ndarray) -> np.ndarray:
        """(n,) f32 -> bytes, by the CPU backend's own (vectorised) function."""
        traits = self.traits(type_)  # the gguf package's size of Q8_1, 40 bytes, is not ggml's 36
        data = np.ascontiguousarray(row, dtype=np.float32)
        out = np.zeros(data.size // traits.blck_size * traits.type_size, dtype=np.uint8)
        self.traits_cpu(type_).from_float(data.ctypes.data, out.ctypes.data, data.size)
        return out

    def vec_dot(self, type_: GGMLQuantizationType, weight_row: np.ndarray, partner_row: np.ndarray, n: int) -> float:
        """One row of weights times one row of activations in the partner type, both as bytes."""
        result = np.zeros(1, dtype=np.float32)
        self.traits_cpu(type_).vec_dot(
            n, result.ctypes.data, 0, weight_row.ctypes.data, 0, partner_row.ctypes.data, 0, 1
        )
        return float(result[0])


@lru_cache(maxsize=1)
def _open() -> Ggml | str:
    try:
        import llama_cpp
    except ImportError:
        return "llama-cpp-python is not installed (extra `validate`)"
    lib = Path(llama_cpp.__file__).parent / "lib"
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    base, cpu = lib / f"libggml-base.{suffix}", lib / f"libggml-cpu.{suffix}"
    if not (base.is_file() and cpu.is_file()):
        return f"llama-cpp-python has no {base.name} and {cpu.name} in {lib}"
    return Ggml(ctypes.CDLL(str(base)), ctypes.CDLL(str(cpu)))


def load() -> Ggml:
    """The libraries, opened once; skips the calling test where they are missing."""
    found = _open()
    if isinstance(found, str):
        pytest.skip(found)
    return found
