"""Mixture of experts: selects experts and sums up their outputs."""

from __future__ import annotations

from typing import Any

from refengine.array import Array


def top_experts(xp: Any, scores: Array, n_used: int) -> Array:
    """Indices of the n_used highest scores of each row, best first, ties to the lower: (n_tokens, n_used) int64."""
    return xp.argsort(-scores, axis=-1, kind="stable")[:, :n_used]


def row_soft_max(xp: Any, x: Array) -> Array:
    """Softmax over the last axis."""
    e = xp.exp(x - x.max(axis=-1, keepdims=True))
    return e * (1.0 / e.sum(axis=-1, keepdims=True, dtype=xp.float64)).astype(x.dtype)


def sum_experts(experts: Array) -> Array:
    """(n_tokens, n_used, n_embd) → (n_tokens, n_embd), added in the router's rank order."""
    total = experts[:, 0]
    for rank in range(1, experts.shape[1]):
        total = total + experts[:, rank]
    return total
