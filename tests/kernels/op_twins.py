"""`KernelOps` on the CPU (host build, every access checked) or on the GPU, with NumPy in and out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refengine.cache.paged import KVCache
from refengine.cuda.memory import DeviceMemory
from refengine.cuda.ops import KernelOps
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.upload import Uploader, bytes_for
from refengine.device import open_device
from refengine.errors import DeviceError
from refengine.trace import to_numpy


class OpsThere:
    """Operations of a place, called with NumPy arrays. `.ops` is the KernelOps itself."""

    def __init__(self, place: str) -> None:
        try:
            self.xp = open_device("cpu" if place == "host" else "cuda").xp
        except DeviceError as e:
            pytest.skip(f"no GPU: {e}")
        self.ops = KernelOps(self.xp, Kernels(place, "checked"), DeviceMemory(self.xp))

    def put(self, value: Any) -> Any:
        return self.xp.asarray(value) if isinstance(value, np.ndarray) else value

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            # Ids and slots stay on the host, as models hand them over.
            there = [g if isinstance(g, np.ndarray) and g.dtype == np.int64 else self.put(g) for g in given]
            result = getattr(self.ops, name)(*there, **{key: self.put(value) for key, value in named.items()})
            return result if result is None else to_numpy(result)

        return call

    def matrix(self, w: Any) -> Any:
        """A stored matrix, packed in an arena of its own."""
        arena = self.ops.memory.arena("weights", bytes_for([(w.type, w.shape)], []))
        return Uploader(self.xp, arena).matrix(w)

    def cache(self, n_head_kv: int, head_dim: int, n_blocks: int, block_size: int = 64) -> KVCache:
        n_ctx = n_blocks * block_size
        return KVCache(
            self.ops.kv_arrays, 1, n_head_kv, head_dim, n_ctx=n_ctx, n_blocks=n_blocks, block_size=block_size
        )
