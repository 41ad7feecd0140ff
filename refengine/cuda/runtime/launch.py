"""All kernel files for a GPU (`cuda`) or built for the CPU (`host`), compiled at their first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from refengine.cuda.runtime.source import read_source
from refengine.errors import KernelError

HOST_MULTIPROCESSORS = 4  # a small device, so that blocks have several tiles
HOST_MODE = "REFENGINE_HOST_MODE"  # environment variable: `checked` or `debug` for whole models, to find bugs


class Kernels:
    """Launches kernels: `launch("norm", "rms_norm_f32", …)` runs a kernel of kernels_cu/norm.cu."""

    def __init__(self, place: str, host_mode: str | None = None) -> None:
        """host_mode: the mode of `HostModule`; None uses the environment variable, else `plain`."""
        self.place, self._host_mode = place, host_mode or os.environ.get(HOST_MODE, "plain")
        self._modules: dict[str, Any] = {}

    @cached_property
    def n_multiprocessors(self) -> int:
        """The number of multiprocessors that launches are sized for."""
        if self.place == "host":
            return HOST_MULTIPROCESSORS
        import cupy

        return int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def module(self, file: str) -> Any:
        """The `DeviceModule` or `HostModule` of a file. Raises KernelError or DeviceError."""
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
        """Launch a kernel; does nothing if the grid is empty.

        arguments: arrays, None for null pointers, Structs and numbers. what: the name of the tensor, for the
        KernelError of an invalid launch. overlap: see `runtime.driver`.
        """
        if not all(grid):
            return
        try:
            self.module(file).launch(kernel, grid, (block,), arguments, shared_bytes, overlap)
        except KernelError as e:
            raise KernelError(f"{what}: {e}" if what else str(e)) from None


class NoLaunches(Kernels):
    """Launches nothing, to find out what would be launched."""

    n_multiprocessors = 1

    def launch(self, *arguments: Any, **named: Any) -> None:
        pass


class Program(Kernels):
    """Launches that are not made, but prepared and kept, to be made together any number of times, on the same stream.

    The arrays of the launches are not kept alive.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.place, self.n_multiprocessors, self._kernels = kernels.place, kernels.n_multiprocessors, kernels
        self._calls: list[Callable[[], None]] = []

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
        """Add a launch. Raises KernelError for invalid arguments."""
        if not all(grid):
            return
        try:
            module = self._kernels.module(file)
            self._calls.append(module.prepared(kernel, grid, (block,), arguments, shared_bytes, overlap))
        except KernelError as e:
            raise KernelError(f"{what}: {e}" if what else str(e)) from None

    def add(self, call: Callable[[], None]) -> None:
        """Add a call of a function, for launches that are different each time."""
        self._calls.append(call)

    def run(self) -> None:
        """Make all launches and calls, in their order. Raises KernelError for a refused launch."""
        for call in self._calls:
            call()
