"""Rows of float16 times a power of two per row, to which the `fast` profile rounds activations.

The power of two brings the largest magnitude of a row into [2^14, 2^15), so that rows of 1e6 do not overflow and rows
of 1e-6 do not vanish. Elements above 2^-28 of the row's largest keep 11 bits. Rows of zeros, and rows with NaN or
infinity, have the factor 1.
"""

from __future__ import annotations

from typing import Any

from refengine.array import Array


def row_exponents(xp: Any, x: Array) -> Array:
    """The exponent e for each row of (…, n), as (…, 1) int32: the row times 2^-e is rounded to float16."""
    largest = xp.abs(x).max(axis=-1, keepdims=True)
    usable = xp.isfinite(largest) & (largest > 0)
    exponent = xp.frexp(xp.where(usable, largest, x.dtype.type(1)))[1] - 15
    return xp.where(usable, xp.maximum(exponent, -126), 0).astype(xp.int32)


def to_halves(xp: Any, x: Array) -> tuple[Array, Array]:
    """float16 (…, n) and exponents (…, 1) int32: x ≈ halves · 2^exponents."""
    exponents = row_exponents(xp, x)
    return xp.ldexp(x, -exponents).astype(xp.float16), exponents


def rounded_rows(xp: Any, x: Array) -> Array:
    """x rounded to halves times powers of two, in its own type."""
    halves, exponents = to_halves(xp, x)
    return xp.ldexp(halves.astype(x.dtype), exponents)
