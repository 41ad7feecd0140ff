"""Opens devices: `cpu` is NumPy; `cuda` and `cuda:N` are one GPU; `auto` is a GPU if one is usable, else the CPU;
`host` runs the CUDA kernels built for the CPU.

An explicit choice never falls back to another device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refengine.errors import DeviceError, RequestError, install_hint

INSTALL_HINT = f"{install_hint('cuda13')}; use cuda12 instead of cuda13 for an older driver"


@dataclass(frozen=True)
class Device:
    """An open device. xp: the array module. name: `cpu`, `host` or `cuda:N`. reason: why it was chosen, as text."""

    xp: Any
    name: str
    reason: str

    @property
    def is_gpu(self) -> bool:
        return self.name.startswith("cuda")


class MemoryAccount(Protocol):
    """Allocates a device's memory for kernels, and accounts for it."""

    def accounted(self) -> dict[str, int]:
        """The allocated bytes by purpose: `weights`, `kv`, `workspace`."""

    def check_residency(self) -> None:
        """Raises `DeviceError` if a buffer is not plain device memory."""


def open_device(spec: str) -> Device:
    """Open a device: `cpu`, `host`, `cuda`, `cuda:N` or `auto`.

    Raises `RequestError` for other names, and `DeviceError` if the device cannot be opened.
    """
    if spec == "cpu":
        return Device(np, "cpu", "requested")
    if spec == "host":
        return Device(np, "host", "kernels built for the CPU: for tests and debuggers")
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", spec)
    if match:
        return _open_cuda(int(match[1] or 0), "requested")
    if spec == "auto":
        try:
            return _open_cuda(0, "a CUDA device is present")
        except DeviceError as e:
            return Device(np, "cpu", f"no GPU is usable: {e}")
    raise RequestError(f"unknown device {spec!r}; choose cpu, cuda, cuda:N, auto or host")


def _open_cuda(index: int, reason: str) -> Device:
    try:
        import cupy
    except ImportError as e:
        raise DeviceError(f"device cuda:{index} needs CuPy, which cannot be imported ({e}); {INSTALL_HINT}") from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        if index < count:
            cupy.cuda.Device(index).use()
    except RuntimeError as e:  # CuPy's CUDARuntimeError, or CUDA libraries that cannot be loaded
        raise DeviceError(f"device cuda:{index} cannot be opened: {e}; is a driver installed?") from None
    if index >= count:
        raise DeviceError(f"device cuda:{index} does not exist: this machine has {count} CUDA device(s)")
    return Device(cupy, f"cuda:{index}", reason)
