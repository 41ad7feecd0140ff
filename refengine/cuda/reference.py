"""What kernels compute that no op does, in array code: the twins of preparations and of layouts."""

from __future__ import annotations

import numpy as np

from refengine.cuda.layout import TILE_COLUMNS, activation_order


def activations_f16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as products take them: halves (n_rows, n_in) in the device's order, and the power of two of each row.

    x: (n_rows, n_in) float32. The largest of a row comes into [2^14, 2^15); rows of zeros and rows with NaN or infinity
    keep their scale 1. x ≈ halves · scale, to 2^-11 of each element that is not below 2^-28 of its row's largest.
    """
    largest = np.abs(x).max(axis=1)
    usable = np.isfinite(largest) & (largest > 0)
    exponent = np.where(usable, np.maximum(np.frexp(np.where(usable, largest, 1.0))[1] - 15, -126), 0)
    with np.errstate(all="ignore"):
        halves = np.ldexp(x, -exponent[:, None]).astype(np.float16)
    order = activation_order(x.shape[1])
    return halves[:, order], np.ldexp(np.float32(1), exponent).astype(np.float32)


def block_sums(halves: np.ndarray) -> np.ndarray:
    """Σ of every 32 halves in float64: what the kernel's float32 sums are near. (n_rows, n_in / 32)."""
    return halves.reshape(len(halves), -1, TILE_COLUMNS).astype(np.float64).sum(axis=-1)
