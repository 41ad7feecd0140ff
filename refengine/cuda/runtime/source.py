"""Kernel sources: the text to compile, and the kernels' signatures, which are parsed from it.

`common.cuh`, and each header that a file includes, is inserted before it, with `#line`. So there is only one text to
compile and to hash, and the compiler's messages have the right file and line. Because signatures are parsed from the
text, the check of a launch always agrees with the kernel. Independent of compilers and devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import numpy as np

from refengine.errors import KernelError

PREAMBLE = "common.cuh"
Constants = tuple[tuple[str, str], ...]  # macros with which a kernel file is compiled: names and values
Part = tuple[str, Constants]  # a kernel file, and the constants with which it is compiled

# C types of parameters and the array or scalar types that fit them.
TYPES: dict[str, tuple[str, ...]] = {
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
_DTYPES = {kind: tuple(np.dtype(name) for name in names) for kind, names in TYPES.items()}
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_STRUCT = re.compile(r"^struct (\w+) \{\n((?:  [^\n()]*\* ?\w+;\n)+|(?:  int \w+;\n)+)\};", re.MULTILINE)
_MACRO = re.compile(r"^#define (\w+)\((\w+)[^)]*\)((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)', re.DOTALL
)


class Struct:
    """Arrays or numbers that are one argument of a kernel, passed by value: a C struct of pointers, or of ints.

    None is a null pointer. A Struct keeps its arrays alive, and collects their pointers only once.
    """

    __slots__ = ("_words", "fits", "members")

    def __init__(self, *members: Any) -> None:
        self.members = members
        self.fits: set[str] = set()  # the C structs that the members were checked against
        self._words: tuple[int, ...] | None = None

    @property
    def words(self) -> tuple[int, ...]:
        """What the kernel gets: numbers, and the addresses of arrays, 0 for None."""
        if self._words is None:
            self._words = tuple(m if type(m) is int else 0 if m is None else address_of(m) for m in self.members)
        return self._words


class Numbers:
    """A dataclass of the numbers of a launch, in the order of the C struct that the kernel takes."""

    @cached_property
    def struct(self) -> Struct:
        return Struct(*self._values)

    @property
    def constants(self) -> Constants:
        """What makes a kernel for these numbers alone."""
        return (("PLAN", ", ".join(map(str, self._values))),)

    @property
    def _values(self) -> tuple[int, ...]:
        return astuple(cast(Any, self))


def address_of(array: Any) -> int:
    """The address of a NumPy or CuPy array. Raises AttributeError for any other value."""
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel. kind: its C type without const and *. members: of a struct, pointers or ints.

    dtypes: the allowed dtypes of arrays and NumPy scalars.
    """

    name: str
    kind: str
    pointer: bool
    writable: bool
    members: tuple[Parameter, ...] = ()
    dtypes: tuple[np.dtype[Any], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", _DTYPES.get(self.kind, ()))


@dataclass(frozen=True)
class Source:
    """A kernel file, ready to compile. text: the preamble, its headers and the file. kernels: name → parameters."""

    name: str
    text: str
    kernels: dict[str, tuple[Parameter, ...]]


def folder() -> Path:
    """The folder of the kernel sources: the package's `kernels_cu`, which is a link in a checkout.

    Raises KernelError if the sources are missing.
    """
    place = Path(str(files("refengine") / "kernels_cu"))
    if not (place / PREAMBLE).is_file():
        raise KernelError(f"no kernel sources in {place}: the installation is incomplete")
    return place


def names() -> list[str]:
    """The names of all kernel files, without the suffix."""
    return sorted(path.stem for path in folder().glob("*.cu"))


def read_source(name: str, constants: Constants = ()) -> Source:
    """Read kernels_cu/`name`.cu. constants: macros to be defined before it, each a name and a value.

    Raises KernelError if it is missing or a signature cannot be parsed.
    """
    path = folder() / f"{name}.cu"
    if not path.is_file():
        raise KernelError(f"no kernel file {path.name}; there are {', '.join(names())}")
    text = path.read_text(encoding="utf-8")
    headers = [PREAMBLE, *_INCLUDE.findall(text)]
    parts = [(header, (folder() / header).read_text(encoding="utf-8")) for header in headers]
    source = source_of(name, *parts, (path.name, _INCLUDE.sub("", text)))
    if not constants:
        return source
    defined = "".join(f"#define {macro} {value}\n" for macro, value in constants)
    return replace(source, text=f'#line 1 "constants"\n{defined}{source.text}')


@lru_cache(maxsize=64)  # a start reads some files for many plans
def source_of(name: str, *parts: tuple[str, str]) -> Source:
    """A source made from (file name, text) parts, one after another."""
    text = "".join(f'#line 1 "{file}"\n{part}\n' for file, part in parts)
    *headers, plain = (re.sub(r"//[^\n]*|/\*.*?\*/", "", part, flags=re.DOTALL) for _, part in parts)
    structs = dict(found for part in (*headers, plain) for found in _STRUCT.findall(part))
    signatures = {kernel: _parameters(name, kernel, given, structs) for kernel, given in _signatures(plain)}
    return Source(name, text, signatures)


def _signatures(plain: str) -> Iterator[tuple[str, str]]:
    """Yields kernels and parameters. For a macro whose first argument is the kernel's name, one kernel for each use."""
    for macro, argument, body in _MACRO.findall(plain):
        for kernel, given in _KERNEL.findall(body.replace("\\\n", " ")):
            if kernel == argument:
                yield from ((use, given) for use in re.findall(rf"^{macro}\((\w+)", plain, re.MULTILINE))
    yield from _KERNEL.findall(_MACRO.sub("", plain))


def _parameters(file: str, kernel: str, text: str, structs: dict[str, str]) -> tuple[Parameter, ...]:
    """Parse a parameter list. structs: the members of each struct that the text declares, as text."""
    parameters = []
    for declaration in filter(None, (" ".join(d.split()) for d in text.split(","))):
        match = re.fullmatch(r"(const )?([\w ]+?) ?(\*)? ?(?:__restrict__ )?(\w+)", declaration)
        members: tuple[Parameter, ...] = ()
        if match is not None and not match[3] and match[2] in structs:
            members = _parameters(file, match[2], structs[match[2]].replace(";", ","), {})
        if match is None or (match[2] not in TYPES and not members):
            raise KernelError(f"{file}.cu: {kernel}: parameter {declaration!r} has a type that launches do not support")
        parameters.append(Parameter(match[4], match[2], match[3] is not None, match[1] is None, members))
    return tuple(parameters)
