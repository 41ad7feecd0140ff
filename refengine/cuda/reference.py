"""Array code for what kernels compute but no operation in `ops` does: row preparations and layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refengine.cuda.layout import TILE_COLUMNS, activation_order
from refengine.ops.attention import attention as written_out
from refengine.ops.halves import to_halves


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows x (n_rows, n_in) float32 as products read them: `ops.halves.to_halves` in the device's column order.

    Returns halves (n_rows, n_in) float16 and the power of two of each row, (n_rows,) float32: x ≈ halves · scale.
    """
    with np.errstate(all="ignore"):
        halves, exponents = to_halves(np, x)
    return halves[:, activation_order(x.shape[1])], np.ldexp(np.float32(1), exponents[:, 0]).astype(np.float32)


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
    """`ops.attention.attention` on the kernels' cache (`PagedRows`), with the score matrix written and float32 sums."""
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
    """Blocks of a cache as float32, (n, block_size, n_head_kv, head_dim)."""
    powers = xp.ldexp(np.float32(1), cache.exponents[blocks].astype(np.int32) - 127)
    return (cache.values[blocks].astype(np.float32) * powers[..., None]).swapaxes(1, 2)


def block_sums(halves: np.ndarray) -> np.ndarray:
    """The sum of every 32 halves in float64, (n_rows, n_in / 32). The kernel's float32 sums are near it."""
    sums: np.ndarray = halves.reshape(len(halves), -1, TILE_COLUMNS).astype(np.float64).sum(axis=-1)
    return sums
