"""Rows of integers times a power of two for every 256 columns, to which the `fast` profile rounds activations.

A product with a quantised matrix, whose codes are integers, is then exact within a block, and its sum does not depend
on the order of additions. The integers have 16 bits, as two signed bytes 256 h + l: the power of two is the least with
which no magnitude is above 127 · 256 + 127. So the error is at most half of the last bit, 2^-15 of the segment's
largest magnitude, where a float16 has up to 2^-11 of the element: in rows as they are, a sixth of float16's error.
The scale of a segment with NaN or infinity is NaN. Segments of zeros have the smallest power of two, 2^-126.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.array import Array

SEGMENT = 256
LARGEST = 127 * 256 + 127


def by_segment(xp: Any, x: Array) -> Array:
    """Rows (…, n) as segments (…, n_segments, 256), with zeros after the row's end."""
    missing = -x.shape[-1] % SEGMENT
    if missing:
        x = xp.concatenate([x, xp.zeros((*x.shape[:-1], missing), x.dtype)], axis=-1)
    return x.reshape(*x.shape[:-1], -1, SEGMENT)


def to_integers(xp: Any, x: Array) -> tuple[Array, Array]:
    """Segments (…, n_segments, 256) int32 and their powers of two (…, n_segments, 1), in the type of x: x ≈ integers ·
    scale."""
    segments = by_segment(xp, x)
    largest = xp.abs(segments).max(axis=-1, keepdims=True)
    usable = xp.isfinite(largest)
    finite = xp.where(usable, largest, x.dtype.type(1))
    exponent = xp.frexp(finite)[1] - 15
    exponent = exponent + (xp.ldexp(finite, -exponent) >= LARGEST + 0.5)
    exponent = xp.where(finite > 0, xp.maximum(exponent, -126), -126).astype(np.int32)
    integers = xp.rint(xp.ldexp(xp.where(usable, segments, x.dtype.type(0)), -exponent)).astype(np.int32)
    scale = xp.ldexp(xp.ones_like(largest), exponent)
    return integers, xp.where(usable, scale, x.dtype.type(np.nan))


def rounded_to_integers(xp: Any, x: Array) -> Array:
    """x rounded to integers times powers of two, in its own type. A segment with NaN or infinity becomes NaN."""
    integers, scale = to_integers(xp, x)
    return (integers.astype(x.dtype) * scale).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
