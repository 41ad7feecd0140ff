"""What kernels compute that no op does, in array code: the twins of preparations and of layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refengine.cuda.layout import TILE_COLUMNS, activation_order
from refengine.ops.attention import attention as written_out


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


def attention(
    xp: Any,
    Qcur: Any,
    k_cache: Any,
    v_cache: Any,
    batch: Any,
    *,
    scale: float,
    window: int,
    sinks: Any | None,
    probe: Callable[..., Any],
) -> Any:
    """`ops.attention.attention` on a kernels' cache (`PagedRows`): the score matrix is written, sums are float32's."""
    outputs = []
    for span in batch.spans:
        blocks = xp.asarray(span.block_table)
        K, V = (_values(xp, cache, blocks) for cache in (k_cache, v_cache))
        alone = replace(span, start=0, stop=span.stop - span.start, block_table=np.arange(len(span.block_table)))
        q, positions = Qcur[span.start : span.stop], batch.positions[span.start : span.stop]
        outputs.append(
            written_out(
                xp,
                q,
                K,
                V,
                [alone],
                positions,
                scale=scale,
                window=window,
                sinks=sinks,
                round_to=None,
                sum_dtype=np.float32,
                probe=probe,
            )
        )
    return outputs[0] if len(outputs) == 1 else xp.concatenate(outputs)


def _values(xp: Any, cache: Any, blocks: Any) -> Any:
    """Blocks of a cache as float32: (n, block_size, n_head_kv, head_dim)."""
    powers = xp.ldexp(np.float32(1), cache.exponents[blocks].astype(np.int32) - 127)
    return cache.values[blocks].astype(np.float32) * powers[..., None]


def block_sums(halves: np.ndarray) -> np.ndarray:
    """Σ of every 32 halves in float64: what the kernel's float32 sums are near. (n_rows, n_in / 32)."""
    sums: np.ndarray = halves.reshape(len(halves), -1, TILE_COLUMNS).astype(np.float64).sum(axis=-1)
    return sums
