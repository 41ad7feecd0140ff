"""Kernels on a GPU: compiled by NVRTC, once for each architecture and source, loaded and launched with CuPy.

This is the only module that compiles for a device; compiling needs no driver. All options are given here. CuPy's own
compilation is not used, because it adds options (`-ftz=true`) and does not support `sm_90a`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refengine.cuda.runtime.arguments import Arguments
from refengine.cuda.runtime.cubin_cache import cache_folder, digest, write_whole
from refengine.cuda.runtime.driver import Launcher
from refengine.cuda.runtime.source import Source
from refengine.errors import DeviceError, KernelError, install_hint

# Architectures for which kernels are compiled and tested, and the bytes of shared memory that a block may have there.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}
ARCHITECTURES = tuple(SHARED_LIMITS)
# Arithmetic exactly as written: no contraction of a·b + c, denormals kept, division and root rounded to nearest.
OPTIONS = ("-std=c++17", "-default-device", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
# Percentage of a multiprocessor's memory that is shared memory, not cache. Kernels overlap only if both have the same.
CARVEOUT = 100
UNASKED_SHARED = 48 << 10  # bytes of shared memory, static and dynamic, of a launch without setting an attribute


@dataclass(frozen=True)
class Resources:
    """Of a kernel: registers per thread; bytes of static shared memory, stack, and spills; number of instructions."""

    registers: int
    shared: int
    stack: int
    spilled: int
    instructions: int


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, its file, and the resources of each kernel."""

    cubin: bytes
    path: Path
    resources: dict[str, Resources]


def compile_source(source: Source, arch: str) -> Compiled:
    """The machine code of a source, from the cache if it has it.

    Raises KernelError with NVRTC's messages, DeviceError if NVRTC is not installed or does not support `arch`.
    """
    nvrtc, version = _nvrtc()
    path, resources_path = _cache_paths(source, arch)
    if path.exists() and resources_path.exists():
        resources = json.loads(resources_path.read_text())
        return Compiled(path.read_bytes(), path, {name: Resources(**r) for name, r in resources.items()})
    program = nvrtc.createProgram(source.text, f"{source.name}.cu", [], [])
    try:
        nvrtc.compileProgram(program, [f"-arch={arch}", "--ptxas-options=-v", *OPTIONS])
        cubin = nvrtc.getCUBIN(program)
        compiled = Compiled(cubin, path, _resources(nvrtc.getProgramLog(program), instructions(cubin)))
    except nvrtc.NVRTCError as e:
        log = nvrtc.getProgramLog(program).strip()
        if "invalid value for" in log:
            raise DeviceError(f"NVRTC {version} does not support {arch}: {log[:300]}") from None
        raise KernelError(f"{source.name}.cu does not compile for {arch} ({e}):\n{log[:4000]}") from None
    finally:
        nvrtc.destroyProgram(program)
    write_whole(resources_path, json.dumps({name: asdict(r) for name, r in compiled.resources.items()}).encode())
    write_whole(path, compiled.cubin)
    return compiled


def is_compiled(source: Source, arch: str) -> bool:
    """Whether a source's machine code is in the cache. Raises DeviceError if NVRTC is not installed."""
    return all(path.exists() for path in _cache_paths(source, arch))


def _cache_paths(source: Source, arch: str) -> tuple[Path, Path]:
    """The paths in the cache of a source's machine code, and of its kernels' resources."""
    key = digest(source.text, arch, *OPTIONS, nvrtc_version())
    path = cache_folder() / f"{source.name}-{arch}-{key}.cubin"
    return path, path.with_suffix(".json")


def _nvrtc() -> tuple[Any, str]:
    try:
        from cupy.cuda import nvrtc

        return nvrtc, ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, RuntimeError, OSError) as e:
        raise DeviceError(
            f"kernels need CuPy and NVRTC, which cannot be loaded ({e}); {install_hint('cuda13')}; without a GPU, use "
            "nvrtc instead of cuda13"
        ) from None


def nvrtc_version() -> str:
    """NVRTC's version. Raises DeviceError if it is not installed."""
    return _nvrtc()[1]


_FIGURES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def _resources(log: str, n_instructions: dict[str, int]) -> dict[str, Resources]:
    found = {}
    for name, stack, stores, loads, registers, rest in _FIGURES.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        figures = (int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
        found[name] = Resources(*figures, n_instructions[name])
    return dict(sorted(found.items()))


def instructions(cubin: bytes) -> dict[str, int]:
    """The number of instructions of each kernel in machine code, with those that fill its last 128 bytes.

    A cubin is an ELF file of 64 bits, with a section `.text.` for each kernel; an instruction has 16 bytes (CUDA Binary
    Utilities, "Instruction Set Reference").
    """
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<2I4Q", cubin, start + i * size) for i in range(count)]
    offset = sections[names][4]
    named = {cubin[offset + s[0] : cubin.index(b"\0", offset + s[0])].decode(): s for s in sections}
    return {name[len(".text.") :]: s[5] // 16 for name, s in named.items() if name.startswith(".text.")}


class DeviceModule:
    """One kernel file on the current CUDA device. `launch` is like that of `host.HostModule`, with CuPy arrays."""

    def __init__(self, source: Source, arch: str | None = None) -> None:
        import cupy

        self.source = source
        self.compiled = compile_source(source, arch or architecture(cupy))
        self._driver = cupy.cuda.driver
        self.module = cupy.RawModule(path=str(self.compiled.path))
        self._launchers: dict[str, Launcher] = {}
        self._shared_limits = {name: UNASKED_SHARED - r.shared for name, r in self.compiled.resources.items()}
        self._carved: set[str] = set()
        self._overlaps = int(cupy.cuda.Device().compute_capability) >= 90
        self._stream = cupy.cuda.get_current_stream

    def raw_kernel(self, kernel: str) -> Any:
        """The kernel as a `cupy.RawKernel`, to read its attributes or to launch it directly."""
        return self.module.get_function(kernel)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> None:
        """Launch a kernel on the current stream. Raises KernelError for invalid arguments, or a refused launch.

        overlap: let it begin before the previous kernel has ended; only for kernels that call `wait_for_previous`.
        """
        launcher, stream = self._launcher(kernel, shared_bytes, overlap), self._stream().ptr
        status = launcher.launch(grid, block, arguments, shared_bytes, stream, overlap and self._overlaps)
        if status:
            self._refused(status, kernel, grid, block)

    def prepared(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> Callable[[], None]:
        """Like `launch`, but returns the launch, to be made any number of times, on the stream that is current now.

        It does not keep the arrays alive.
        """
        launcher, stream = self._launcher(kernel, shared_bytes, overlap).another(), self._stream().ptr
        launcher.prepare(grid, block, arguments, shared_bytes, stream, overlap and self._overlaps)

        def launch() -> None:
            status = launcher.again()
            if status:
                self._refused(status, kernel, grid, block)

        return launch

    def _launcher(self, kernel: str, shared_bytes: int, overlap: bool) -> Launcher:
        """The launcher of a kernel, which may use so many bytes of shared memory."""
        launcher = self._launchers.get(kernel)
        if launcher is None:
            arguments = Arguments(self.source, kernel)  # first, because it names an unknown kernel
            launcher = self._launchers[kernel] = Launcher(arguments, self.raw_kernel(kernel).kernel.ptr)
        if overlap and self._overlaps and kernel not in self._carved:
            attribute = self._driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            self._driver.funcSetAttribute(self.raw_kernel(kernel).kernel.ptr, attribute, CARVEOUT)
            self._carved.add(kernel)
        if shared_bytes > self._shared_limits.get(kernel, 0):
            # CuPy loads a file once in a process, so other modules of it have the same function: never lower its limit.
            attribute = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            function = self.raw_kernel(kernel).kernel.ptr
            try:
                limit = max(shared_bytes, self._driver.funcGetAttribute(attribute, function))
                self._driver.funcSetAttribute(function, attribute, limit)
            except RuntimeError as e:  # CUDADriverError
                raise KernelError(f"{kernel}: launch with {shared_bytes} bytes of shared memory refused: {e}") from None
            self._shared_limits[kernel] = limit
        return launcher

    def _refused(self, status: int, kernel: str, grid: Sequence[int], block: Sequence[int]) -> None:
        """Raises KernelError with the driver's name of an error."""
        try:
            self._driver.check_status(status)
        except RuntimeError as e:  # CUDADriverError
            raise KernelError(f"{kernel}: launch of grid {tuple(grid)}, block {tuple(block)} refused: {e}") from None


def architecture(cupy: Any) -> str:
    """The architecture of the current device, such as `sm_80`; `sm_90a` if the kernels use its special instructions."""
    capability = str(cupy.cuda.Device().compute_capability)
    return "sm_90a" if capability == "90" else f"sm_{capability}"
