"""Kernel sources: the text that is compiled, and the kernels' signatures as they stand in it.

`common.cuh`, and each header that a file includes, is put in front of it, with `#line`: one text is all there is to
compile and to hash, and messages of the compiler name the right file and line. Signatures are read from the text: what
a launch is checked against cannot be out of step with the kernel. Knows nothing of compilers and devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from refengine.errors import KernelError

PREAMBLE = "common.cuh"

# C types of parameters and the array or scalar types that fit them.
_TYPES: dict[str, tuple[str, ...]] = {
    "float": ("float32",),
    "double": ("float64",),
    "f16": ("float16", "uint16"),
    "unsigned short": ("uint16", "float16"),
    "unsigned char": ("uint8",),
    "signed char": ("int8",),
    "int": ("int32",),
    "unsigned": ("uint32",),
    "long long": ("int64",),
    "unsigned long long": ("uint64",),
}
_DTYPES = {kind: frozenset(np.dtype(name) for name in names) for kind, names in _TYPES.items()}
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_MACRO = re.compile(r"^#define (\w+)\((\w+)[^)]*\)((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)', re.DOTALL
)


@dataclass(frozen=True)
class Parameter:
    """One of a kernel's: `kind` is its C type without const and *."""

    name: str
    kind: str
    pointer: bool
    writable: bool


@dataclass(frozen=True)
class Source:
    """A kernel file, ready to compile. text: with the preamble in front. kernels: name → parameters."""

    name: str
    text: str
    kernels: dict[str, tuple[Parameter, ...]]


def folder() -> Path:
    """The folder of the kernel sources: `kernels_cu` of the package, in a checkout a link to the one beside it.

    Raises KernelError where the sources are missing.
    """
    place = Path(str(files("refengine") / "kernels_cu"))
    if not (place / PREAMBLE).is_file():
        raise KernelError(f"no kernel sources in {place}: the installation is incomplete")
    return place


def names() -> list[str]:
    """Every kernel file, without its ending."""
    return sorted(path.stem for path in folder().glob("*.cu"))


def read_source(name: str) -> Source:
    """`name` of kernels_cu/name.cu. Raises KernelError where it is missing or a signature cannot be read."""
    path = folder() / f"{name}.cu"
    if not path.is_file():
        raise KernelError(f"no kernel file {path.name}; there are {', '.join(names())}")
    text = path.read_text(encoding="utf-8")
    headers = [PREAMBLE, *_INCLUDE.findall(text)]
    parts = [(header, (folder() / header).read_text(encoding="utf-8")) for header in headers]
    return source_of(name, *parts, (path.name, _INCLUDE.sub("", text)))


def source_of(name: str, *parts: tuple[str, str]) -> Source:
    """A source of (file name, text) parts, one after the other."""
    text = "".join(f'#line 1 "{file}"\n{part}\n' for file, part in parts)
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", "", parts[-1][1], flags=re.DOTALL)
    return Source(name, text, {kernel: _parameters(name, kernel, given) for kernel, given in _signatures(plain)})


def _signatures(plain: str) -> Iterator[tuple[str, str]]:
    """Kernels and parameters; of a macro whose first argument is the kernel's name, those for each of its uses."""
    for macro, argument, body in _MACRO.findall(plain):
        for kernel, given in _KERNEL.findall(body.replace("\\\n", " ")):
            if kernel == argument:
                yield from ((use, given) for use in re.findall(rf"^{macro}\((\w+)", plain, re.MULTILINE))
    yield from _KERNEL.findall(_MACRO.sub("", plain))


def _parameters(file: str, kernel: str, text: str) -> tuple[Parameter, ...]:
    found = []
    for declaration in filter(None, (" ".join(d.split()) for d in text.split(","))):
        match = re.fullmatch(r"(const )?([\w ]+?) ?(\*)? ?(?:__restrict__ )?(\w+)", declaration)
        if match is None or match[2] not in _TYPES:
            raise KernelError(f"{file}.cu: {kernel}: parameter {declaration!r} has a type that launches do not know")
        found.append(Parameter(match[4], match[2], match[3] is not None, match[1] is None))
    return tuple(found)


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """A grid or block of one to three sizes, as launches take it."""
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def check_arguments(source: Source, kernel: str, arguments: Sequence[Any]) -> tuple[Parameter, ...]:
    """That arrays and NumPy scalars fit the kernel's parameters in number and type. Raises KernelError; see W-1431."""
    if kernel not in source.kernels:
        raise KernelError(f"{source.name}.cu has no kernel {kernel!r}; it has {', '.join(source.kernels)}")
    parameters = source.kernels[kernel]
    if len(arguments) != len(parameters):
        raise KernelError(f"{kernel} takes {len(parameters)} arguments, {len(arguments)} were given")
    for parameter, value in zip(parameters, arguments, strict=True):
        if value is None and parameter.pointer:
            continue  # a null pointer, where the kernel allows one
        # At every launch, for every argument: what is wrong is worked out where something is.
        known = getattr(value, "dtype", None) in _DTYPES[parameter.kind]
        if not known or parameter.pointer is isinstance(value, np.generic):
            raise KernelError(f"{kernel}: {parameter.name} must be {_misfit(parameter, value)}")
        if parameter.pointer and not value.flags.c_contiguous:
            raise KernelError(
                f"{kernel}: {parameter.name} must be contiguous, found shape {value.shape} with strides {value.strides}"
            )
    return parameters


def _misfit(parameter: Parameter, value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    if dtype is None or parameter.pointer is isinstance(value, np.generic):
        return f"{'an array' if parameter.pointer else 'a NumPy scalar'}: {value!r:.60}"
    return f"{' or '.join(_TYPES[parameter.kind])}, found {dtype.name}"
