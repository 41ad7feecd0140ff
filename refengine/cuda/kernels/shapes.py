"""Shapes of the arrays that bindings are given, checked before a launch (W-1431)."""

from __future__ import annotations

from refengine.array import Array
from refengine.errors import KernelError


def check_shape(what: str, name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    """Raises KernelError if an array has another shape. what: the tensor or the kernel; None: an array left out."""
    if array is not None and array.shape != expected:
        raise KernelError(f"{what}: {name} has the shape {array.shape}, expected {expected}")
