"""All kernel files for a GPU (`cuda`) or built for the CPU (`host`), compiled at their first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from refengine.cuda.runtime.source import Constants, Part, read_source
from refengine.errors import KernelError

HOST_MULTIPROCESSORS = 4  # a small device, so that blocks have several tiles
HOST_SHARED = 227 << 10  # bytes of shared memory of a block, as on sm_90
HOST_MODE = "REFENGINE_HOST_MODE"  # environment variable: `checked` or `debug` for whole models, to find bugs


class Kernels:
    """Launches kernels: `launch("norm", "rms_norm_f32", …)` runs a kernel of kernels_cu/norm.cu.

    for_plans: kernels that depend on many numbers are compiled for each plan, with these numbers as constants.
    """

    for_plans = False

    def __init__(self, place: str, host_mode: str | None = None) -> None:
        """host_mode: the mode of `HostModule`; None uses the environment variable, else `plain`."""
        self.place, self._host_mode = place, host_mode or os.environ.get(HOST_MODE, "plain")
        self._modules: dict[tuple[str, Constants], Any] = {}

    @cached_property
    def n_multiprocessors(self) -> int:
        """The number of multiprocessors that launches are sized for."""
        if self.place == "host":
            return HOST_MULTIPROCESSORS
        import cupy

        return int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    @cached_property
    def shared_limit(self) -> int:
        """The bytes of dynamic and static shared memory that a block may have."""
        if self.place == "host":
            return HOST_SHARED
        import cupy

        return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])

    def module(self, file: str, constants: Constants = ()) -> Any:
        """The `DeviceModule` or `HostModule` of a file, compiled with constants. Raises KernelError or DeviceError."""
        module = self._modules.get((file, constants))
        if module is None:
            source = read_source(file, constants)
            if self.place == "host":
                from refengine.cuda.runtime.host import HostModule

                module = HostModule(source, self._host_mode)
            else:
                from refengine.cuda.runtime.nvrtc import DeviceModule

                module = DeviceModule(source)
            self._modules[file, constants] = module
        return module

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
        constants: Constants = (),
    ) -> None:
        """Launch a kernel; does nothing if the grid is empty.

        arguments: arrays, None for null pointers, Structs and numbers. what: the name of the tensor, for the
        KernelError of an invalid launch. overlap: see `runtime.driver`. constants: see `source.read_source`.
        """
        if not all(grid):
            return
        try:
            self.module(file, constants).launch(kernel, grid, (block,), arguments, shared_bytes, overlap)
        except KernelError as e:
            raise KernelError(f"{what}: {e}" if what else str(e)) from None

    def call(self, function: Callable[[], None]) -> None:
        """Call a function that launches kernels itself, in its turn among the launches."""
        function()


class NoLaunches(Kernels):
    """Launches nothing, to find out what would be launched."""

    n_multiprocessors, shared_limit = 1, HOST_SHARED

    def launch(self, *arguments: Any, **named: Any) -> None:
        pass

    def call(self, function: Callable[[], None]) -> None:
        pass


class _Around(Kernels):
    """Other kernels, on the same device and with the same modules."""

    def __init__(self, kernels: Kernels) -> None:
        self.place = kernels.place
        self.n_multiprocessors, self.shared_limit = kernels.n_multiprocessors, kernels.shared_limit
        self._kernels = kernels

    def module(self, file: str, constants: Constants = ()) -> Any:
        return self._kernels.module(file, constants)


class ForPlans(_Around):
    """The same kernels, of which those that depend on a plan are compiled for each plan."""

    for_plans = True

    def launch(self, *arguments: Any, **named: Any) -> None:
        self._kernels.launch(*arguments, **named)

    def call(self, function: Callable[[], None]) -> None:
        self._kernels.call(function)


class Needed(NoLaunches):
    """Launches nothing, but notes which files, with which constants, would have to be compiled for each plan."""

    for_plans = True

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels.place)
        self.n_multiprocessors, self.shared_limit = kernels.n_multiprocessors, kernels.shared_limit
        self.parts: list[Part] = []

    def launch(self, file: str, *arguments: Any, constants: Constants = (), **named: Any) -> None:
        if constants and (file, constants) not in self.parts:
            self.parts.append((file, constants))


class Program(_Around):
    """Launches that are not made, but kept, to be made together any number of times, on the same stream.

    prepared: keep them as the driver reads them, which does not keep their arrays alive. False keeps their arguments.
    """

    def __init__(self, kernels: Kernels, prepared: bool = True) -> None:
        super().__init__(kernels)
        self._prepared = prepared
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
        constants: Constants = (),
    ) -> None:
        """Add a launch. If launches are prepared, raises KernelError for invalid arguments."""
        if not all(grid):
            return
        if not self._prepared:
            launch = partial(self._kernels.launch, what=what, constants=constants)
            self.call(partial(launch, file, kernel, grid, block, arguments, shared_bytes, overlap))
            return
        try:
            self.call(self.module(file, constants).prepared(kernel, grid, (block,), arguments, shared_bytes, overlap))
        except KernelError as e:
            raise KernelError(f"{what}: {e}" if what else str(e)) from None

    def call(self, function: Callable[[], None]) -> None:
        """Add a function that launches kernels itself, because its launches are different each time."""
        self._calls.append(function)

    def run(self) -> None:
        """Make all launches, in their order. Raises KernelError for a refused launch."""
        for call in self._calls:
            call()
