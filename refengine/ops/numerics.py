"""Numerics profiles: how weights, activations and sums are rounded. Reported wherever a number is shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refengine.errors import RequestError


@dataclass(frozen=True)
class Numerics:
    """One profile.

    dtype:       of activations.
    sum_dtype:   in which products with weights are formed and summed. llama.cpp sums the integer products of a block
                 exactly and only the blocks in float32; float64 comes closer to that than float32 sums of everything
                 (NMSE 6e-15 against 9e-14), and the closer, the fewer activations round the other way further on.
    kv_dtype:    of the KV cache.
    as_llamacpp: round as llama.cpp's CPU backend does: activations to the weight type's partner before a product,
                 Q and the attention weights to float16 when the cache is float16, GELU through its float16 table.
    reversed_sums: add the products of a sum from its other end: what an order of additions does, to measure noise.
    half_rows:   as the GPU kernels round: activations, keys, values and attention weights to float16 with a power of
                 two for each row (`ops.halves`), attention in tiles of 64 positions. Products with F32 and BF16 weights
                 round nothing.
    """

    name: str
    dtype: type
    sum_dtype: type
    kv_dtype: type
    as_llamacpp: bool
    reversed_sums: bool = False
    half_rows: bool = False


PROFILES = {
    "exact": Numerics("exact", np.float32, np.float32, np.float32, as_llamacpp=False),
    "exact64": Numerics("exact64", np.float64, np.float64, np.float64, as_llamacpp=False),
    "llamacpp": Numerics("llamacpp", np.float32, np.float64, np.float16, as_llamacpp=True),
    "fast": Numerics("fast", np.float32, np.float64, np.float16, as_llamacpp=False, half_rows=True),
}

KV_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def profile(name: str, kv_type: str | None = None) -> Numerics:
    """The profile called `name`, its cache type overridden by `kv_type` (`f16`, `f32`, `f64`)."""
    if name not in PROFILES:
        raise RequestError(f"unknown numerics profile {name!r}; choose one of {', '.join(PROFILES)}")
    base = PROFILES[name]
    if kv_type is None:
        return base
    if base.half_rows and kv_type != "f16":
        raise RequestError(f"numerics profile {name} has a float16 KV cache, {kv_type!r} was asked for")
    if kv_type not in KV_TYPES:
        raise RequestError(f"unknown KV cache type {kv_type!r}; choose one of {', '.join(KV_TYPES)}")
    return replace(base, kv_dtype=KV_TYPES[kv_type])
