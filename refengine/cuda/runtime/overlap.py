"""Launches that may begin before the previous kernel has ended (programmatic dependent launch, sm_90).

CuPy has no function for it, so the driver's `cuLaunchKernelEx` is called through ctypes. In a graph capture it creates
a programmatic edge.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def launch_overlapping(
    function: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[Any],
    shared_bytes: int,
    stream: int,
) -> None:
    """Launch a kernel that may overlap with the previous one. Raises RuntimeError with the driver's error number.

    arguments: CuPy arrays, NumPy scalars, and NumPy arrays with a struct's bytes.
    """
    on_host = (np.ndarray, np.generic)
    values = [np.asarray(a) if isinstance(a, on_host) else np.array(a.data.ptr, np.uint64) for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    config = _Config(
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        shared_bytes,
        stream or None,
        ctypes.pointer(attribute),
        1,
    )
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: CUresult {status}")
