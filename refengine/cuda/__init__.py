"""Raw CUDA kernels: sources, compilation, launches, device memory. The CUDA C code is in `kernels_cu/`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refengine.cuda.memory import DeviceMemory
from refengine.cuda.ops import KernelOps
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.upload import Uploader, bytes_for
from refengine.device import Device
from refengine.weights import CHUNK_BYTES, is_vector


@dataclass(frozen=True)
class KernelDevice:
    """A device that runs kernels, with its memory and the uploader for a model's weights."""

    ops: KernelOps
    memory: DeviceMemory
    uploader: Uploader


def open_kernels(
    device: Device, tensors: Iterable[Any], attention_by: str = "flash", chunk_bytes: int = CHUNK_BYTES
) -> KernelDevice:
    """Prepare a device for kernels and allocate memory for the weights. Raises DeviceError if they do not fit.

    tensors: those of the file (name, type, shape). chunk_bytes: the size of one copy to the device.
    """
    memory = DeviceMemory(device.xp)
    ops = KernelOps(device.xp, Kernels("host" if device.xp is np else "cuda"), memory, attention_by)
    return KernelDevice(ops, memory, Uploader(device.xp, memory.arena("weights", weight_bytes(tensors)), chunk_bytes))


def weight_bytes(tensors: Iterable[Any]) -> int:
    """The bytes of device memory that tensors (name, type, shape) need in the kernels' layout."""
    matrices, vectors = [], []
    for info in tensors:
        if is_vector(info):
            vectors.append(4 * int(np.prod(info.shape)))
        else:
            matrices.append((info.type, info.shape))
    return bytes_for(matrices, vectors)
