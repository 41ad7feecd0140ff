"""Kernels on a GPU: compiled by NVRTC, once for each architecture and source, loaded and launched through CuPy.

The only place that compiles for a device. It needs no driver to compile. Options are written out here; nothing is taken
from CuPy's own compilation path, which adds some (`-ftz=true`), and cannot take `sm_90a`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refengine.cuda.runtime.cubin_cache import cache_folder, digest, write_whole
from refengine.cuda.runtime.overlap import launch_overlapping
from refengine.cuda.runtime.source import Source, Struct, check_arguments, three
from refengine.errors import DeviceError, KernelError, install_hint

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
# Sums are written as they are meant: no contraction of a·b + c, denormals kept, division and root rounded to nearest.
OPTIONS = ("-std=c++17", "-default-device", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_NULL = np.uintp(0)
STATIC_LIMIT = 48 << 10  # bytes of shared memory that a launch may have without asking


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes: registers a thread; bytes of static shared memory, of stack, and spilled."""

    registers: int
    shared: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, the file that holds it, and what each kernel takes."""

    cubin: bytes
    path: Path
    resources: dict[str, Resources]


def compile_source(source: Source, arch: str) -> Compiled:
    """Machine code of a source, from the cache if it is there.

    Raises KernelError with NVRTC's messages, DeviceError where NVRTC is not installed or does not know `arch`.
    """
    nvrtc, version = _nvrtc()
    path, facts = _kept(source, arch)
    if path.exists() and facts.exists():
        told = json.loads(facts.read_text())
        return Compiled(path.read_bytes(), path, {name: Resources(**r) for name, r in told.items()})
    program = nvrtc.createProgram(source.text, f"{source.name}.cu", [], [])
    try:
        nvrtc.compileProgram(program, [f"-arch={arch}", "--ptxas-options=-v", *OPTIONS])
        compiled = Compiled(nvrtc.getCUBIN(program), path, _resources(nvrtc.getProgramLog(program)))
    except nvrtc.NVRTCError as e:
        log = nvrtc.getProgramLog(program).strip()
        if "invalid value for" in log:
            raise DeviceError(f"NVRTC {version} does not know {arch}: {log[:300]}") from None
        raise KernelError(f"{source.name}.cu does not compile for {arch} ({e}):\n{log[:4000]}") from None
    finally:
        nvrtc.destroyProgram(program)
    write_whole(facts, json.dumps({name: asdict(r) for name, r in compiled.resources.items()}).encode())
    write_whole(path, compiled.cubin)
    return compiled


def is_compiled(source: Source, arch: str) -> bool:
    """Whether the cache has its machine code. Raises DeviceError where NVRTC is not installed."""
    return all(path.exists() for path in _kept(source, arch))


def _kept(source: Source, arch: str) -> tuple[Path, Path]:
    """Where the cache has its machine code, and what its kernels take."""
    key = digest(source.text, arch, *OPTIONS, nvrtc_version())
    path = cache_folder() / f"{source.name}-{arch}-{key}.cubin"
    return path, path.with_suffix(".json")


def _nvrtc() -> tuple[Any, str]:
    try:
        from cupy.cuda import nvrtc

        return nvrtc, ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, RuntimeError, OSError) as e:
        raise DeviceError(
            f"kernels need CuPy and NVRTC, which cannot be loaded ({e}); {install_hint('cuda13')}; without a GPU, "
            "nvrtc instead of cuda13"
        ) from None


def nvrtc_version() -> str:
    """NVRTC's version. Raises DeviceError where it is not installed."""
    return _nvrtc()[1]


_FIGURES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def _resources(log: str) -> dict[str, Resources]:
    found = {}
    for name, stack, stores, loads, registers, rest in _FIGURES.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
    return dict(sorted(found.items()))


class DeviceModule:
    """One kernel file on the current CUDA device: `launch` as `host.HostModule` has it, with CuPy arrays."""

    def __init__(self, source: Source, arch: str | None = None) -> None:
        import cupy

        self.source = source
        self.compiled = compile_source(source, arch or architecture(cupy))
        self._driver = cupy.cuda.driver
        self.module = cupy.RawModule(path=str(self.compiled.path))
        self._functions: dict[str, Any] = {}
        self._overlaps = int(cupy.cuda.Device().compute_capability) >= 90
        self._stream = cupy.cuda.get_current_stream

    def raw_kernel(self, kernel: str) -> Any:
        """The kernel as CuPy has it: a `cupy.RawKernel`, to look at its attributes or to launch it by hand."""
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
        """Start a kernel on the current stream. Raises KernelError for what does not fit, or a refused launch.

        overlap: let it begin before the one in front of it has ended; only for kernels with `wait_for_previous`.
        """
        checked = check_arguments(self.source, kernel, arguments)
        function = self._functions.get(kernel)
        if function is None:
            function = self._functions[kernel] = self.raw_kernel(kernel).kernel
        given = [_NULL if a is None else a.packed if isinstance(a, Struct) else a for a in checked]
        try:
            if shared_bytes > STATIC_LIMIT:
                attribute = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._driver.funcSetAttribute(function.ptr, attribute, shared_bytes)
            if overlap and self._overlaps:
                launch_overlapping(function.ptr, three(grid), three(block), given, shared_bytes, self._stream().ptr)
            else:
                function(three(grid), three(block), given, shared_bytes)
        except RuntimeError as e:  # CUDADriverError
            raise KernelError(f"{kernel}: launch of grid {tuple(grid)}, block {tuple(block)} refused: {e}") from None


def architecture(cupy: Any) -> str:
    """`sm_80` and the like of the current device; with its own instructions (`a`) where the kernels use them."""
    capability = str(cupy.cuda.Device().compute_capability)
    return "sm_90a" if capability == "90" else f"sm_{capability}"
