"""Checks the shapes of the bindings' arguments before a launch (W-1431)."""

from __future__ import annotations

from refengine.array import Array
from refengine.errors import KernelError


def check_shape(what: str, name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    """Raises KernelError if an array has another shape; None is not checked. what: the name of the tensor or kernel."""
    if array is not None and array.shape != expected:
        raise KernelError(f"{what}: {name} has the shape {array.shape}, expected {expected}")
