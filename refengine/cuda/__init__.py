"""Raw CUDA kernels: sources, compilation, launches, device memory. `kernels_cu/` holds the CUDA C."""

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
    """A device that runs kernels, with room for a model's weights."""

    ops: KernelOps
    memory: DeviceMemory
    uploader: Uploader


def open_kernels(
    device: Device, tensors: Iterable[Any], attention_by: str = "flash", chunk_bytes: int = CHUNK_BYTES
) -> KernelDevice:
    """tensors: of the file (name, type, shape). chunk_bytes: of a copy. Raises DeviceError where they do not fit."""
    memory = DeviceMemory(device.xp)
    ops = KernelOps(device.xp, Kernels("host" if device.xp is np else "cuda"), memory, attention_by)
    return KernelDevice(ops, memory, Uploader(device.xp, memory.arena("weights", weight_bytes(tensors)), chunk_bytes))


def weight_bytes(tensors: Iterable[Any]) -> int:
    """What the kernels' arrangement of tensors (name, type, shape) takes of a device."""
    matrices, vectors = [], []
    for info in tensors:
        if is_vector(info):
            vectors.append(4 * int(np.prod(info.shape)))
        else:
            matrices.append((info.type, info.shape))
    return bytes_for(matrices, vectors)
