"""Numerics profiles: how weights, activations and sums are rounded. Reported wherever a number is shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refengine.errors import RequestError


@dataclass(frozen=True)
class Numerics:
    """One profile.

    dtype:       of activations and of accumulation in matrix products.
    kv_dtype:    of the KV cache.
    as_llamacpp: round as llama.cpp's CPU backend does: activations to the weight type's partner before a product,
                 Q and the attention weights to float16 when the cache is float16, GELU through its float16 table.
    """

    name: str
    dtype: type
    kv_dtype: type
    as_llamacpp: bool

    @property
    def is_float64(self) -> bool:
        return self.dtype is np.float64


PROFILES = {
    "exact": Numerics("exact", np.float32, np.float32, as_llamacpp=False),
    "exact64": Numerics("exact64", np.float64, np.float64, as_llamacpp=False),
    "llamacpp": Numerics("llamacpp", np.float32, np.float16, as_llamacpp=True),
}

KV_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def profile(name: str, kv_type: str | None = None) -> Numerics:
    """The profile called `name`, its cache type overridden by `kv_type` (`f16`, `f32`, `f64`)."""
    if name not in PROFILES:
        raise RequestError(f"unknown numerics profile {name!r}; choose one of {', '.join(PROFILES)}")
    base = PROFILES[name]
    if kv_type is None:
        return base
    if kv_type not in KV_TYPES:
        raise RequestError(f"unknown KV cache type {kv_type!r}; choose one of {', '.join(KV_TYPES)}")
    return Numerics(base.name, base.dtype, KV_TYPES[kv_type], base.as_llamacpp)
