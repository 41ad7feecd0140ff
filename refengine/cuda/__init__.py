"""Raw CUDA kernels: sources, compilation, launches, device memory. `kernels_cu/` holds the CUDA C."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refengine.cuda.kernels import Kernels
from refengine.cuda.memory import DeviceMemory
from refengine.cuda.ops import KernelOps
from refengine.cuda.upload import Uploader, bytes_for
from refengine.device import Device
from refengine.weights import is_vector


@dataclass(frozen=True)
class KernelDevice:
    """A device that runs kernels, with room for a model's weights."""

    ops: KernelOps
    memory: DeviceMemory
    uploader: Uploader


def open_kernels(device: Device, tensors: Iterable[Any], attention_by: str = "flash") -> KernelDevice:
    """tensors: of the file (name, type, shape). Raises DeviceError where they do not fit."""
    memory = DeviceMemory(device.xp)
    ops = KernelOps(device.xp, Kernels("host" if device.xp is np else "cuda"), memory, attention_by)
    matrices, vectors = [], []
    for info in tensors:
        if is_vector(info):
            vectors.append(4 * int(np.prod(info.shape)))
        else:
            matrices.append((info.type, info.shape))
    arena = memory.arena("weights", bytes_for(matrices, vectors))
    return KernelDevice(ops, memory, Uploader(device.xp, arena))
