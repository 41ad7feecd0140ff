"""Array code for what kernels compute but no operation in `ops` does: row preparations and layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refengine.cuda.layout import TILE_COLUMNS, activation_order
from refengine.ops.attention import attention as written_out
from refengine.ops.halves import to_halves
from refengine.ops.integers import by_segment, to_integers


def quantize_rows(x: np.ndarray, halves: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows x (n_rows, n_in) float32 as products read them: `ops.integers` or `ops.halves` in the device's column order.

    Returns data, sums and scale, with the shapes of `kernels.quantize_rows.Converted`. Sums of halves are not defined.
    """
    order = activation_order()
    with np.errstate(all="ignore"):
        if halves:
            values, exponents = to_halves(np, by_segment(np, x))
            scale = np.ldexp(np.float32(1), exponents[..., 0]).astype(np.float32)
            data = np.ascontiguousarray(values.reshape(*scale.shape, -1, TILE_COLUMNS)[..., order]).view(np.uint8)
            return data.reshape(*scale.shape, -1), np.zeros((*scale.shape, 16), np.int32), scale
        integers, scales = to_integers(np, x)
    low = (integers + 128) % 256 - 128
    words = np.stack([(integers - low) // 256, low], axis=-2).astype(np.int8)  # (n, n_segments, 2 bytes, 256)
    of_blocks = words.reshape(*words.shape[:-1], -1, TILE_COLUMNS)[..., order].reshape(*words.shape[:-1], -1, 4, 8)
    data = np.ascontiguousarray(of_blocks.transpose(0, 1, 3, 4, 2, 5)).view(np.uint8)  # …, block, lane c, byte, column
    sums = integers.reshape(*integers.shape[:-1], -1, 16).sum(axis=-1, dtype=np.int32)
    return data.reshape(*data.shape[:2], -1), sums, scales[..., 0]


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
