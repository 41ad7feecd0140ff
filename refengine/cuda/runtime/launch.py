"""All kernel files of one place, compiled when first wanted: a GPU (`cuda`), or their build for the CPU (`host`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from refengine.cuda.runtime.source import read_source
from refengine.errors import KernelError

HOST_MULTIPROCESSORS = 4  # a small device: blocks have several tiles
HOST_MODE = "REFENGINE_HOST_MODE"  # environment: `checked` and `debug` run whole models so, for gdb and for hunting


class Kernels:
    """`launch("norm", "rms_norm_f32", …)`: a kernel of kernels_cu/norm.cu."""

    def __init__(self, place: str, host_mode: str | None = None) -> None:
        """host_mode: of `HostModule`, else what the environment says, else `plain`."""
        self.place, self._host_mode = place, host_mode or os.environ.get(HOST_MODE, "plain")
        self._modules: dict[str, Any] = {}

    @cached_property
    def n_multiprocessors(self) -> int:
        """What a launch is cut for."""
        if self.place == "host":
            return HOST_MULTIPROCESSORS
        import cupy

        return int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def module(self, file: str) -> Any:
        """`DeviceModule` or `HostModule` of a file. Raises KernelError, DeviceError."""
        if file not in self._modules:
            source = read_source(file)
            if self.place == "host":
                from refengine.cuda.runtime.host import HostModule

                self._modules[file] = HostModule(source, self._host_mode)
            else:
                from refengine.cuda.runtime.nvrtc import DeviceModule

                self._modules[file] = DeviceModule(source)
        return self._modules[file]

    def launch(
        self,
        file: str,
        kernel: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        overlap: bool = False,
        *,
        what: str = "",
    ) -> None:
        """Start a kernel; nothing is done where the grid is empty.

        arguments: arrays, None for null pointers, Structs and numbers. what: the tensor it is for, named in the
        KernelError that a bad launch raises. overlap: see `runtime.overlap`.
        """
        if not all(grid):
            return
        try:
            self.module(file).launch(kernel, grid, (block,), arguments, shared_bytes, overlap)
        except KernelError as e:
            raise KernelError(f"{what}: {e}" if what else str(e)) from None
