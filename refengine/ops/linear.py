"""Products with stored weight matrices, and rows of them (embedding).

Products use the float values of the weights. A matrix whose values fit into the cache (`ops.dequant`) is dequantised
once; any other is dequantised in slices of rows at every use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.array import Array
from refengine.ops.dequant import DequantCache, StoredMatrix, float_rows
from refengine.ops.halves import rounded_rows
from refengine.ops.integers import by_segment, rounded_to_integers
from refengine.ops.numerics import Numerics

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)  # types whose products are in float32 in profile `fast`
SLICE_ELEMENTS = 4 << 20  # elements of an uncached matrix that are dequantised at a time: 16 MiB as float32


def linear(xp: Any, x: Array, w: StoredMatrix, numerics: Numerics, cache: DequantCache, expert: int = 0) -> Array:
    """y = x Wᵀ (of expert `expert`). x: (n_tokens, n_in); W: (n_out, n_in) as stored; returns (n_tokens, n_out).

    With llama.cpp's rounding, the row is first quantised to the weight type's partner. The product of the rounded
    values then equals llama.cpp's integer products, scaled block by block; Q4_1 and Q5_1 need an additional correction
    (`quants.q8_1_residual`).
    """
    n_out = w.shape[-2]
    if x.shape[0] == 0:  # there are no rows if no logits are needed
        return xp.zeros((0, n_out), dtype=x.dtype)
    first = expert * n_out
    activation = x
    if numerics.as_llamacpp:
        activation = quants.round_activation(xp, x, w.type)
    elif numerics.as_kernels and w.type == GGMLQuantizationType.F16:
        activation = rounded_rows(xp, by_segment(xp, x)).reshape(len(x), -1)[:, : x.shape[1]]
    elif numerics.as_kernels and w.type not in FLOATS:
        activation = rounded_to_integers(xp, x)
    rounded: Array = activation.astype(numerics.sum_dtype, copy=False)
    whole = cache.get(xp, w, first, first + n_out, numerics.sum_dtype)
    order = slice(None, None, -1) if numerics.reversed_sums else slice(None)
    rounded = rounded[:, order]
    if whole is not None:
        y = rounded @ whole[:, order].T
    else:
        y = xp.empty((x.shape[0], n_out), dtype=numerics.sum_dtype)
        step = max(1, SLICE_ELEMENTS // w.shape[-1])
        for start in range(0, n_out, step):
            stop = min(start + step, n_out)
            part = float_rows(xp, w, first + start, first + stop, numerics.sum_dtype)
            y[:, start:stop] = rounded @ part[:, order].T
    if numerics.as_llamacpp and quants.SUPPORTED[w.type].partner == "Q8_1":
        minimums = quants.mins(xp, w.rows(first, first + n_out), w.type, (n_out, w.shape[-1]))
        y = y + quants.q8_1_residual(xp, x).astype(numerics.sum_dtype) @ minimums.T
    return y.astype(numerics.dtype, copy=False)


def linear_experts(xp: Any, x: Array, w: StoredMatrix, chosen: Array, numerics: Numerics, cache: DequantCache) -> Array:
    """y[t, r] = x[t, r] W[chosen[t, r]]ᵀ, expert by expert.

    x: (n_tokens, n_used, n_in), or (n_tokens, 1, n_in) shared by all ranks; chosen: (n_tokens, n_used) expert indices;
    W: (n_expert, n_out, n_in) as stored; returns (n_tokens, n_used, n_out).
    """
    n_tokens, n_used = chosen.shape
    y = xp.empty((n_tokens, n_used, w.shape[-2]), dtype=numerics.dtype)
    rows = xp.broadcast_to(x, (n_tokens, n_used, x.shape[-1]))
    for expert in [int(e) for e in xp.unique(chosen)]:
        token, rank = xp.nonzero(chosen == expert)
        y[token, rank] = linear(xp, rows[token, rank], w, numerics, cache, expert)
    return y


def embedding(xp: Any, w: StoredMatrix, ids: np.ndarray, dtype: Any) -> Array:
    """Rows `ids` of the embedding matrix, dequantised. ids: (n,) host integers; returns (n, n_embd)."""
    raw = w.data.reshape(w.shape[0], -1)[xp.asarray(ids)]
    return quants.dequantize(xp, raw.reshape(-1), w.type, (len(ids), w.shape[-1])).astype(dtype, copy=False)
