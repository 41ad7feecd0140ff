"""The arguments of launches: checked against the kernels' signatures (W-1431), and written as the driver reads them.

This runs at every launch, and a prompt takes hundreds of launches. So the layout of a kernel's arguments is computed
once, one call packs them all, and error messages are made only if a check has failed.
"""

from __future__ import annotations

import copy
import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from refengine.cuda.runtime.source import TYPES, Parameter, Source, Struct, address_of
from refengine.errors import KernelError

# The codes of module `struct` for C types.
_CODES = {
    "float": "f",
    "double": "d",
    "f16": "e",
    "unsigned short": "H",
    "unsigned char": "B",
    "signed char": "b",
    "int": "i",
    "unsigned": "I",
    "long long": "q",
    "unsigned long long": "Q",
}
_POINTER = "Q"
_NUMBERS = {int, float, bool}


class Arguments:
    """The arguments of one kernel in memory, written anew for each launch. Raises KernelError for an unknown kernel.

    pointers: a C array with the address of each argument.
    """

    def __init__(self, source: Source, kernel: str) -> None:
        found = source.kernels.get(kernel)
        if found is None:
            raise KernelError(f"{source.name}.cu has no kernel {kernel!r}; it has {', '.join(source.kernels)}")
        self._kernel, self._parameters = kernel, found
        layout, offsets, size = "<", [], 0  # little-endian and without padding of its own: only so are floats checked
        for parameter in found:
            first = parameter.members[0] if parameter.members else parameter  # members have the same type
            code = _POINTER if first.pointer else _CODES[first.kind]
            padding = -size % struct.calcsize(f"<{code}")
            layout += f"{padding}x{code * max(len(parameter.members), 1)}"
            offsets.append(size + padding)
            size = struct.calcsize(layout)
        self._layout, self._offsets = struct.Struct(layout), offsets
        self._allocate()

    def _allocate(self) -> None:
        self._memory = ctypes.create_string_buffer(max(self._layout.size, 1))
        start = ctypes.addressof(self._memory)
        addresses = [start + offset for offset in self._offsets]
        self.pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)

    def another(self) -> Arguments:
        """Arguments of the same kernel in memory of their own."""
        made = copy.copy(self)
        made._allocate()
        return made

    def write(self, arguments: Sequence[Any]) -> None:
        """Check arguments and write them to the memory: arrays, None for null pointers, Structs and numbers.

        Raises KernelError for a wrong number of arguments, type, range or layout; a fraction is not allowed for an
        integer.
        """
        if len(arguments) != len(self._parameters):
            raise KernelError(f"{self._kernel} takes {len(self._parameters)} arguments, {len(arguments)} were given")
        values: list[Any] = []
        for parameter, value in zip(self._parameters, arguments, strict=True):
            if parameter.pointer:
                values.append(0 if value is None else self._address(parameter, value))
            elif parameter.members:
                if type(value) is not Struct or parameter.kind not in value.fits:
                    self._check_struct(parameter, value)
                values += value.words
            elif type(value) in _NUMBERS or (isinstance(value, np.generic) and value.dtype in parameter.dtypes):
                values.append(value)
            else:
                raise KernelError(f"{self._kernel}: {parameter.name} must be {_misfit(parameter, value)}")
        try:
            self._layout.pack_into(self._memory, 0, *values)
        except (struct.error, OverflowError):
            self._check_numbers(arguments)
            raise

    def _address(self, parameter: Parameter, value: Any, prefix: str = "") -> int:
        try:
            if value.dtype in parameter.dtypes and value.flags.c_contiguous:
                return address_of(value)
        except AttributeError:  # no array
            pass
        named, kind = f"{self._kernel}: {prefix}{parameter.name} must be", _misfit(parameter, value)
        if kind is None:
            raise KernelError(f"{named} contiguous, found shape {value.shape} with strides {value.strides}")
        raise KernelError(f"{named} {kind}")

    def _check_struct(self, parameter: Parameter, value: Any) -> None:
        """Check a Struct's members, once for each C struct. Raises KernelError."""
        if not isinstance(value, Struct) or len(value.members) != len(parameter.members):
            kind = "arrays" if parameter.members[0].pointer else "numbers"
            raise KernelError(f"{self._kernel}: {parameter.name} must be a Struct of {len(parameter.members)} {kind}")
        for member, given in zip(parameter.members, value.members, strict=True):
            if not member.pointer and type(given) is not int:
                raise KernelError(f"{self._kernel}: {parameter.name}.{member.name} must be an int, found {given!r:.60}")
            if member.pointer and given is not None:
                self._address(member, given, f"{parameter.name}.")
        value.fits.add(parameter.kind)

    def _check_numbers(self, arguments: Sequence[Any]) -> None:
        """Raises KernelError for the number that does not fit its C type."""
        for parameter, value in zip(self._parameters, arguments, strict=True):
            members = zip(parameter.members, value.members, strict=True) if parameter.members else [(parameter, value)]
            for member, number in members:
                if member.pointer:
                    continue
                try:
                    struct.pack(f"<{_CODES[member.kind]}", number)
                except (struct.error, OverflowError):
                    named = f"{self._kernel}: {f'{parameter.name}.' if parameter.members else ''}{member.name}"
                    if isinstance(number, float) and member.kind not in ("float", "double"):
                        raise KernelError(f"{named} must be a whole number, found {number}") from None
                    raise KernelError(f"{named} is {number}, out of range for {member.kind}") from None


def _misfit(parameter: Parameter, value: Any) -> str | None:
    """What a parameter takes, and what was given instead; None if the kind of value and its type are right."""
    dtype, scalar = getattr(value, "dtype", None), isinstance(value, np.generic)
    if dtype is None or parameter.pointer is scalar:
        return f"{'an array' if parameter.pointer else 'a number'}: {value!r:.60}"
    return None if dtype in parameter.dtypes else f"{' or '.join(TYPES[parameter.kind])}, found {dtype.name}"


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """A grid or block of one to three sizes, extended to three."""
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
