"""Numerics profiles: how weights, activations and sums are rounded. Results are always reported with their profile."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refengine.errors import RequestError


@dataclass(frozen=True)
class Numerics:
    """One profile.

    dtype:       the type of activations.
    sum_dtype:   the type in which products with weights are computed and summed. llama.cpp sums the integer products of
                 a block exactly and only the blocks in float32. float64 is nearer to that than float32 sums of all
                 products (NMSE 6e-15 instead of 9e-14), so fewer activations are rounded the other way afterwards.
    kv_dtype:    the type of the KV cache.
    as_llamacpp: round like llama.cpp's CPU backend: activations to the weight type's partner before a product, Q and
                 the attention weights to float16 if the cache is float16, GELU with its float16 table.
    reversed_sums: add the products of a sum in the reverse order, to measure the noise of the order of additions.
    as_kernels:  round like the GPU kernels: activations to integers of 16 bits with a power of two for every 256
                 columns (`ops.integers`), for F16 weights to float16 likewise (`ops.halves`), not for F32 and BF16
                 weights; keys, values and attention weights to float16 with a power of two for each row; attention
                 in tiles of 64 positions.
    """

    name: str
    dtype: type
    sum_dtype: type
    kv_dtype: type
    as_llamacpp: bool
    reversed_sums: bool = False
    as_kernels: bool = False


PROFILES = {
    "exact": Numerics("exact", np.float32, np.float32, np.float32, as_llamacpp=False),
    "exact64": Numerics("exact64", np.float64, np.float64, np.float64, as_llamacpp=False),
    "llamacpp": Numerics("llamacpp", np.float32, np.float64, np.float16, as_llamacpp=True),
    "fast": Numerics("fast", np.float32, np.float64, np.float16, as_llamacpp=False, as_kernels=True),
}

KV_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def profile(name: str, kv_type: str | None = None) -> Numerics:
    """The profile `name`, with the cache type `kv_type` (`f16`, `f32`, `f64`) if given. Raises RequestError."""
    if name not in PROFILES:
        raise RequestError(f"unknown numerics profile {name!r}; choose one of {', '.join(PROFILES)}")
    base = PROFILES[name]
    if kv_type is None:
        return base
    if base.as_kernels and kv_type != "f16":
        raise RequestError(f"numerics profile {name} has a float16 KV cache, {kv_type!r} was requested")
    if kv_type not in KV_TYPES:
        raise RequestError(f"unknown KV cache type {kv_type!r}; choose one of {', '.join(KV_TYPES)}")
    return replace(base, kv_dtype=KV_TYPES[kv_type])
