"""Launches on a GPU, through the driver's `cuLaunchKernelEx`.

CuPy has no function for launches that may begin before the previous kernel has ended (programmatic dependent launch,
sm_90); in a graph capture they create programmatic edges. All other launches take the same way, because it is cheaper:
what does not change from launch to launch is prepared once.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

from refengine.cuda.runtime.arguments import Arguments, three

# CUlaunchAttribute: id and value, of 64 bytes from byte 8 on. CUlaunchConfig: the sizes of the grid and of a block,
# bytes of shared memory, stream, attributes and their number.
_OVERLAPS = struct.pack("i4xi60x", 6, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_CONFIG = struct.Struct("7IQQI")


@cache
def _launch() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


class Launcher:
    """Launches one kernel. function: the driver's handle of it, from the current context."""

    def __init__(self, arguments: Arguments, function: int) -> None:
        self._arguments, self._launch, self._handle = arguments, _launch(), function
        self._function = ctypes.c_void_p(function)
        self._attribute = ctypes.create_string_buffer(_OVERLAPS, len(_OVERLAPS))
        self._attribute_address = ctypes.addressof(self._attribute)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._config_pointer = ctypes.c_void_p(ctypes.addressof(self._config))
        self._sizes: tuple[Any, ...] = ()  # that config has
        self._lock = Lock()  # config and arguments are written before the call, and read in it

    def another(self) -> Launcher:
        """A launcher of the same kernel, with arguments of its own."""
        return Launcher(self._arguments.another(), self._handle)

    def prepare(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int,
        stream: int,
        overlap: bool,
    ) -> None:
        """Write what `again` launches. Raises KernelError for invalid arguments, struct.error for sizes that are no
        whole numbers.
        """
        self._arguments.write(arguments)
        sizes = (grid, block, shared_bytes, stream, overlap)
        if sizes != self._sizes:  # the layers of a model have the same
            _CONFIG.pack_into(
                self._config, 0, *three(grid), *three(block), shared_bytes, stream, self._attribute_address, overlap
            )
            self._sizes = sizes

    def again(self) -> int:
        """Launch what was prepared; returns the driver's CUresult."""
        status: int = self._launch(self._config_pointer, self._function, self._arguments.pointers, None)
        return status

    def launch(self, *what: Any) -> int:
        """`prepare` and `again`, for any number of threads."""
        with self._lock:
            self.prepare(*what)
            return self.again()
