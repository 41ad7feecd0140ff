"""The operations of a forward pass: pure functions on arrays, with the same source for NumPy and CuPy.

`Ops` binds them to one array module, one numerics profile and one weight cache; it is an argument of a model file's
functions. Independent of configurations, files, traces and sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.ops import activation, attention, halves, linear, moe, norm, rope
from refengine.ops.dequant import DequantCache
from refengine.ops.numerics import PROFILES, Numerics, profile

__all__ = ["PROFILES", "DequantCache", "Numerics", "Ops", "profile"]

Angles = tuple[Array, Array]


class Ops:
    """The array operations of one device (`xp`: numpy or cupy) with one numerics profile.

    Arrays have `numerics.dtype`; shapes are given in each function's module. `cache_bytes` limits the dequantised
    weights that are kept.
    """

    def __init__(self, xp: Any, numerics: Numerics, cache_bytes: int) -> None:
        self.xp = xp
        self.numerics = numerics
        self.cache = DequantCache(cache_bytes)

    def embedding(self, w: Any, ids: np.ndarray) -> Array:
        return linear.embedding(self.xp, w, ids, self.numerics.dtype)

    def rows(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows]; x itself if these are all rows."""
        return x if np.array_equal(rows, np.arange(x.shape[0])) else x[self.xp.asarray(rows)]

    def linear(self, x: Array, w: Any, bias: Array | None = None) -> Array:
        y = linear.linear(self.xp, x, w, self.numerics, self.cache)
        return y if bias is None else y + bias

    def linear_experts(self, x: Array, w: Any, chosen: Array) -> Array:
        return linear.linear_experts(self.xp, x, w, chosen, self.numerics, self.cache)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return norm.rms_norm(self.xp, x, weight, eps)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return norm.layer_norm(self.xp, x, weight, bias, eps)

    def rope_angles(self, positions: np.ndarray, constants: Any, freq_factors: Array | None = None) -> Angles:
        factors: Any = freq_factors
        on_host = factors if factors is None or self.xp is np else factors.get()
        cos, sin = rope.rope_angles(positions, constants, on_host, self.numerics.dtype)
        return self.xp.asarray(cos), self.xp.asarray(sin)

    def rope_neox(self, x: Array, angles: Angles) -> Array:
        return rope.rope_neox(self.xp, x, *angles)

    def rope_norm(self, x: Array, angles: Angles) -> Array:
        return rope.rope_norm(self.xp, x, *angles)

    def workspace(self) -> AbstractContextManager[Any]:
        """The context of a forward pass. Here it does nothing; kernels allocate from a pool in it."""
        return nullcontext()

    def kv_arrays(self, n: int, shape: tuple[int, ...]) -> list[Array]:
        """`n` empty parts of a KV cache, (n_blocks, block_size, n_head_kv, head_dim) each, for `kv_append`."""
        dtype = np.float32 if self.numerics.as_kernels else self.numerics.kv_dtype  # rounded values, as float32
        return [self.xp.zeros(shape, dtype=dtype) for _ in range(n)]

    def kv_append(self, cache: Array, new: Array, slots: np.ndarray) -> None:
        rows = halves.rounded_rows(self.xp, new) if self.numerics.as_kernels else new
        attention.kv_append(self.xp, cache, rows, self.xp.asarray(slots))

    def kv_copy(self, cache: Array, source: int, target: int) -> None:
        """Copy block `source` of a cache to block `target`."""
        cache[target] = cache[source]

    def attention(
        self,
        Qcur: Array,
        k_cache: Array,
        v_cache: Array,
        batch: Any,
        *,
        scale: float,
        probe: Callable[..., Array],
        window: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """See `ops.attention.attention`; `batch` has `.spans` and `.positions`."""
        if self.numerics.as_kernels:
            return attention.attention_in_tiles(
                self.xp,
                Qcur,
                k_cache,
                v_cache,
                batch.spans,
                batch.positions,
                scale=scale,
                window=window,
                sinks=sinks,
                sum_dtype=self.numerics.sum_dtype,
                probe=probe,
            )
        as_cached = self.numerics.as_llamacpp and k_cache.dtype == np.float16
        return attention.attention(
            self.xp,
            Qcur,
            k_cache,
            v_cache,
            batch.spans,
            batch.positions,
            scale=scale,
            window=window,
            sinks=sinks,
            round_to=np.float16 if as_cached else None,
            sum_dtype=self.numerics.sum_dtype,
            probe=probe,
        )

    def swiglu(self, gate: Array, up: Array) -> Array:
        return activation.swiglu(self.xp, gate, up)

    def swiglu_clamped(self, gate: Array, up: Array) -> Array:
        return activation.swiglu_clamped(self.xp, gate, up)

    def gelu(self, x: Array) -> Array:
        table = activation.gelu_f16_table if self.numerics.as_llamacpp else activation.gelu
        return table(self.xp, x)

    def top_experts(self, scores: Array, n_used: int) -> Array:
        return moe.top_experts(self.xp, scores, n_used)

    def take_experts(self, scores: Array, chosen: Array) -> Array:
        return self.xp.take_along_axis(scores, chosen, axis=-1)

    def row_soft_max(self, x: Array) -> Array:
        return moe.row_soft_max(self.xp, x)

    def sum_experts(self, experts: Array) -> Array:
        return moe.sum_experts(experts)
