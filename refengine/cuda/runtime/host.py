"""Kernels on the CPU: the unchanged sources, compiled with g++ and kernels_cu/host, and called through ctypes.

For tests and for stepping through a kernel in gdb, not for speed. The libraries are kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refengine.cuda.runtime.arguments import Arguments, three
from refengine.cuda.runtime.cubin_cache import cache_folder, digest
from refengine.cuda.runtime.source import Source, folder
from refengine.errors import KernelError

_MODES = {
    # Checks every access; about ten times slower.
    "checked": ("-O1", "-g", "-fsanitize=thread"),
    "plain": ("-O2",),
    "debug": ("-O0", "-g"),  # for gdb
}


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("start", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("writable", ctypes.c_int),
    )


class HostModule:
    """One kernel file on the CPU. mode: `checked`, `plain` or `debug` (see `_MODES`).

    Raises KernelError if there is no compiler, or if the source does not compile (with the compiler's messages).
    """

    def __init__(self, source: Source, mode: str = "checked") -> None:
        self.source, self.mode = source, mode
        self._library = ctypes.CDLL(str(_build(source, mode)))
        self._launch = self._library.hostcuda_launch
        self._launch.restype = ctypes.c_char_p
        self._arguments: dict[str, Arguments] = {}

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        overlap: bool = False,
        *,
        order: int = 0,
    ) -> None:
        """Run a kernel. arguments: NumPy arrays (as device buffers), Structs and numbers, according to its signature.

        overlap: ignored; kernels run one after another.
        order: 0 runs a block's threads forwards, 1 backwards; higher numbers shuffle them. Results must not change.
        Raises KernelError for invalid arguments, and for anything that is undefined on a GPU: accesses out of bounds,
        misaligned or to a read-only buffer, divergent barriers, reads of uninitialised shared memory.
        """
        written = self._arguments.get(kernel)
        if written is None:
            written = self._arguments[kernel] = Arguments(self.source, kernel)
        written.write(arguments)
        buffers: list[_Buffer] = []
        for parameter, value in zip(self.source.kernels[kernel], arguments, strict=True):
            members, arrays = (parameter.members, value.members) if parameter.members else ((parameter,), (value,))
            for member, array in zip(members, arrays, strict=True):
                if member.pointer and array is not None:
                    start = array.ctypes.data
                    buffers.append(_Buffer(member.name.encode(), start, array.nbytes, int(member.writable)))
        buffer_array = (_Buffer * max(len(buffers), 1))(*buffers)
        error = self._launch(
            kernel.encode(),
            ctypes.cast(self._library[f"hostcuda_call_{kernel}"], ctypes.c_void_p),
            written.pointers,
            (ctypes.c_uint * 3)(*three(grid)),
            (ctypes.c_uint * 3)(*three(block)),
            ctypes.c_size_t(shared_bytes),
            buffer_array,
            len(buffers),
            order,
            int(self.mode == "checked"),
        )
        if error is not None:
            raise KernelError(error.decode(errors="replace"))

    def prepared(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> Callable[[], None]:
        """Like `launch`, but returns the launch, to be made any number of times."""
        return partial(self.launch, kernel, grid, block, list(arguments), shared_bytes, overlap)


def toolchain() -> Path:
    """The folder with hostcuda.h and runtime.cpp."""
    return folder() / "host"


def _build(source: Source, mode: str) -> Path:
    """The shared library of a source, compiled if it is not in the cache. Several processes may build it at once."""
    compiler, tools = os.environ.get("CXX", "g++"), toolchain()
    if shutil.which(compiler) is None:
        raise KernelError(f"kernels on the CPU need a C++ compiler, but {compiler} is missing; set CXX to another one")
    exports = "".join(f"HOSTCUDA_EXPORT({kernel})\n" for kernel in source.kernels)
    header, runtime = tools / "hostcuda.h", tools / "runtime.cpp"
    key = digest(source.text, exports, mode, compiler, header.read_text("utf-8"), runtime.read_text("utf-8"))
    library = cache_folder() / f"host-{source.name}-{mode}-{key}.so"
    if library.exists():
        return library
    flags = [compiler, "-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        code = Path(folder) / f"{source.name}.cpp"
        # The text has #line directives with its file names, so that the debugger finds the sources.
        code.write_text(f'{source.text}#line 1 "exports"\n{exports}', encoding="utf-8")
        objects = [f"{folder}/kernel.o", f"{folder}/runtime.o"]
        _run([*flags, *_MODES[mode], "-include", str(header), "-c", str(code), "-o", objects[0]], source.name)
        _run([*flags, "-O2", "-c", str(runtime), "-o", objects[1]], "hostcuda")
        _run([compiler, "-shared", "-Wl,-Bsymbolic", *objects, "-o", f"{folder}/library.so"], source.name)
        os.replace(f"{folder}/library.so", library)
    return library


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelError(f"{what} does not compile:\n{done.stderr.strip()[:4000]}")
