"""Causal attention over the paged KV cache in separate steps: scores, softmax, weighted sum.

One sequence at a time. With grouped queries (GQA), `n_head / n_head_kv` query heads share a K/V head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from refengine.array import Array
from refengine.ops.halves import rounded_rows, row_exponents

Probe = Callable[..., Array]  # probe(name, x=array) -> array

TILE = 64  # positions per tile in `attention_in_tiles` and in the kernels


def kv_append(xp: Any, cache: Array, new: Array, slots: Array) -> None:
    """Write rows `new` (n_tokens, n_head_kv, head_dim) into `cache` (n_blocks, block_size, n_head_kv, head_dim)."""
    cache.reshape(-1, *cache.shape[2:])[slots] = new.astype(cache.dtype, copy=False)


def kv_read(xp: Any, cache: Array, block_table: Any, n_kv: int, dtype: Any) -> Array:
    """The first n_kv rows of a sequence, in order: (n_kv, n_head_kv, head_dim) in `dtype`."""
    first, n = int(block_table[0]), len(block_table)
    if all(int(block) == first + i for i, block in enumerate(block_table)):
        blocks = cache[first : first + n]  # adjacent blocks: a view without a copy
    else:
        blocks = cache[xp.asarray(block_table)]
    return blocks.reshape(-1, *cache.shape[2:])[:n_kv].astype(dtype, copy=False)


def attention(
    xp: Any,
    Qcur: Array,
    k_cache: Array,
    v_cache: Array,
    spans: Sequence[Any],
    positions: Array,
    *,
    scale: float,
    window: int,
    sinks: Array | None,
    round_to: Any | None,
    sum_dtype: Any,
    probe: Probe,
) -> Array:
    """softmax(scale · Q Kᵀ + mask) V per sequence (Vaswani et al. 2017). Returns (n_tokens, n_head * head_dim).

    Qcur: (n_tokens, n_head, head_dim). window: how many tokens a row can see, including itself; 0 = all.
    sinks: (n_head,) additional logits in each row's softmax without a value (gpt-oss); or None.
    round_to: the type to which Q and the attention weights are rounded before their products (llama.cpp: the cache's
    type), or None. sum_dtype: the type in which both products are computed.
    probe: called with `kq`, `kq_soft_max` (both (n_head, n_tokens, n_kv)) and `kqv` (n_head, n_tokens, head_dim); its
    results are used instead.
    """
    outputs = []
    for span in spans:
        q = Qcur[span.start : span.stop]
        K = kv_read(xp, k_cache, span.block_table, span.n_kv, sum_dtype)  # (n_kv, n_head_kv, head_dim)
        V = kv_read(xp, v_cache, span.block_table, span.n_kv, sum_dtype)  # (n_kv, n_head_kv, head_dim)
        masked = causal_mask(xp, positions[span.start : span.stop], span.n_kv, window)  # (n_tokens, n_kv)
        kq = probe("kq", x=grouped_product(xp, rounded(q, round_to).transpose(1, 0, 2), K.transpose(1, 2, 0)))
        kq_soft_max = probe("kq_soft_max", x=soft_max(xp, kq, masked, scale, sinks))
        kqv = probe("kqv", x=grouped_product(xp, rounded(kq_soft_max, round_to), V.transpose(1, 0, 2)))
        outputs.append(kqv.transpose(1, 0, 2).reshape(q.shape[0], -1))
    return outputs[0] if len(outputs) == 1 else xp.concatenate(outputs)


def attention_in_tiles(
    xp: Any,
    Qcur: Array,
    k_cache: Array,
    v_cache: Array,
    spans: Sequence[Any],
    positions: Array,
    *,
    scale: float,
    window: int,
    sinks: Array | None,
    sum_dtype: Any,
    probe: Probe,
) -> Array:
    """`attention` as the kernels compute it (FlashAttention-2, Dao 2023): tile by tile of TILE positions.

    Q and, in each tile, the attention weights times the values' powers of two are rounded to float16 rows; K and V in
    the cache are already rounded. Tiles are folded in ascending order. probe: called with `kqv`, and for each tile with
    `kq_exp`, which is e^(score - the row's maximum in the tile) before rounding; the kernels have only `kqv`.
    """
    outputs = []
    for span in spans:
        q = rounded_rows(xp, Qcur[span.start : span.stop]).transpose(1, 0, 2)  # (n_head, n_tokens, head_dim)
        K = kv_read(xp, k_cache, span.block_table, span.n_kv, sum_dtype)  # (n_kv, n_head_kv, head_dim)
        V = kv_read(xp, v_cache, span.block_table, span.n_kv, sum_dtype)  # (n_kv, n_head_kv, head_dim)
        powers = xp.ldexp(sum_dtype(1), row_exponents(xp, V))  # (n_kv, n_head_kv, 1)
        masked = causal_mask(xp, positions[span.start : span.stop], span.n_kv, window)  # (n_tokens, n_kv)
        group = q.shape[0] // K.shape[1]
        top = xp.full((*q.shape[:2], 1), -xp.inf, dtype=q.dtype)
        total, kqv = xp.zeros_like(top), xp.zeros_like(q)
        for start in range(0, span.n_kv, TILE):
            part = slice(start, min(start + TILE, span.n_kv))
            kq = grouped_product(xp, q, K[part].transpose(1, 2, 0))  # (n_head, n_tokens, tile)
            scores = xp.where(masked[:, part], q.dtype.type(-xp.inf), kq * q.dtype.type(scale))
            tile_top = scores.max(axis=-1, keepdims=True)
            base = xp.where(xp.isneginf(tile_top), q.dtype.type(0), tile_top)
            e = probe("kq_exp", x=xp.exp(scores - base))  # (n_head, n_tokens, tile)
            power = xp.repeat(powers[part].transpose(1, 2, 0), group, axis=0)  # (n_head, 1, tile)
            weights = rounded_rows(xp, e.astype(sum_dtype) * power)
            weighted = grouped_product(xp, weights, (V[part] / powers[part]).transpose(1, 0, 2))
            new_top = xp.maximum(top, base)
            keep, add = xp.exp(top - new_top), xp.exp(base - new_top)
            seen = ~xp.isneginf(tile_top)
            kqv = xp.where(seen, kqv * keep + weighted.astype(q.dtype) * add, kqv)
            total = xp.where(seen, total * keep + e.sum(axis=-1, keepdims=True) * add, total)
            top = xp.where(seen, new_top, top)
        if sinks is not None:
            sink = sinks.astype(q.dtype, copy=False)[:, None, None]
            new_top = xp.maximum(top, sink)
            keep = xp.exp(top - new_top)
            kqv, total = kqv * keep, total * keep + xp.exp(sink - new_top)
        kqv = probe("kqv", x=kqv / total)
        outputs.append(kqv.transpose(1, 0, 2).reshape(kqv.shape[1], -1))
    return outputs[0] if len(outputs) == 1 else xp.concatenate(outputs)


def causal_mask(xp: Any, positions: Array, n_kv: int, window: int) -> Array:
    """True at positions that a row must not see: later ones, and those `window` or more back. (n_tokens, n_kv) bool."""
    distance = xp.asarray(positions)[:, None] - xp.arange(n_kv)[None, :]
    return (distance < 0) | (distance >= window) if window else distance < 0


def grouped_product(xp: Any, a: Array, b: Array) -> Array:
    """(n_head, n, k) times (n_head_kv, k, m) → (n_head, n, m) in a's type; n_head / n_head_kv heads share each b."""
    n_head, n, k = a.shape
    n_head_kv = b.shape[0]
    merged = a.astype(b.dtype, copy=False).reshape(n_head_kv, n_head // n_head_kv * n, k)
    return xp.matmul(merged, b).reshape(n_head, n, b.shape[2]).astype(a.dtype, copy=False)


def soft_max(xp: Any, kq: Array, masked: Array, scale: float, sinks: Array | None) -> Array:
    """Row-wise softmax of scale · kq; masked entries are exactly 0. Sums are in float64, as in llama.cpp's CPU code."""
    scores = xp.where(masked, kq.dtype.type(-xp.inf), kq * kq.dtype.type(scale))
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(kq.dtype, copy=False)[:, None, None]
        top = xp.maximum(top, sink)
    e = xp.exp(scores - top)
    total = e.sum(axis=-1, keepdims=True, dtype=xp.float64)
    if sinks is not None:
        total = total + xp.exp(sink - top)
    return e * (1.0 / total).astype(kq.dtype)


def rounded(x: Array, dtype: Any | None) -> Array:
    return x if dtype is None else x.astype(dtype).astype(x.dtype)
