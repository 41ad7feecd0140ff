"""One kernel file on the CPU (host build) or on the GPU, called with NumPy arrays either way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from refengine.cuda.runtime.host import HostModule
from refengine.cuda.runtime.source import Constants, Source, Struct, read_source
from refengine.device import open_device
from refengine.errors import DeviceError


class Kernels:
    """`launch` as the modules of refengine.cuda have it; on the GPU, arrays go there and those written come back."""

    def __init__(self, file: str | Source, place: str, constants: Constants = ()) -> None:
        source = read_source(file, constants) if isinstance(file, str) else file
        self.place = place
        self._others: dict[tuple[str, Constants], Kernels] = {}
        if place == "host":
            self.module: Any = HostModule(source)
            return
        try:
            self._xp = open_device("cuda").xp
        except DeviceError as e:
            pytest.skip(f"no GPU: {e}")
        from refengine.cuda.runtime.nvrtc import DeviceModule

        self.module = DeviceModule(source)

    def of(self, file: str, constants: Constants = ()) -> Kernels:
        """Another file in the same place, or this one with constants."""
        if (file, constants) not in self._others:
            self._others[file, constants] = Kernels(file, self.place, constants)
        return self._others[file, constants]

    def _put(self, value: Any) -> Any:
        if isinstance(value, Struct):
            return Struct(*map(self._put, value.members))
        return self._xp.asarray(value) if isinstance(value, np.ndarray) else value

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        order: int = 0,
    ) -> None:
        if self.place == "host":
            self.module.launch(kernel, grid, block, arguments, shared_bytes, order=order)
            return
        there = [self._put(a) for a in arguments]
        self.module.launch(kernel, grid, block, there, shared_bytes)
        for parameter, here, device in zip(self.module.source.kernels[kernel], arguments, there, strict=True):
            if parameter.writable and isinstance(here, np.ndarray):
                here[...] = device.get()
