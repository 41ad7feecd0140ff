"""The other engine, by what a user calls it: llama.cpp, refengine itself under another setting, or a dump."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import refengine
from refengine.errors import RequestError
from refengine.model import Model
from refengine.ops.numerics import KV_TYPES, PROFILES
from refengine.trace import Trace
from refengine.validate.capture import Capture
from refengine.validate.dump import NameMap, read_dump
from refengine.validate.llamacpp import capture_llamacpp

LLAMACPP = "llama.cpp"
SELF = "refengine"
DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog. In 1984 there were 12,345 naïve ones — and you?"
DEFAULT_TOKENS = 32  # of a prompt for a model without vocabulary


def is_dump(peer: str) -> bool:
    """Whether this peer brings a prompt of its own."""
    return peer != LLAMACPP and peer.partition(":")[0] != SELF


def default_ids(model: Model) -> list[int]:
    """A prompt for who gives none: a sentence with numbers, accents and punctuation, or ids 1, 2, 3 …"""
    if model.vocabulary is not None:
        return model.prompt_ids(DEFAULT_PROMPT)
    return [i % model.config.n_vocab for i in range(1, DEFAULT_TOKENS + 1)]


def capture_peer(
    peer: str,
    model: Model,
    ids: Sequence[int] | None = None,
    *,
    names: NameMap | None = None,
    n_threads: int = 2,
    n_ubatch: int | None = None,
    flash_attention: bool = False,
    repack: bool = False,
) -> Capture:
    """What `peer` makes of a prompt.

    peer:  `llama.cpp`; `refengine:SETTING,…` with settings among the profiles, KV types and devices
           (`refengine:exact64`, `refengine:cuda,f16`); else the path of a dump, which has its own prompt.
    names: for a dump. The rest is llama.cpp's (`LlamaCpp`).
    Raises RequestError for a setting that does not exist or ids that do not fit, DumpError, and what engines raise.
    """
    if is_dump(peer):
        return read_dump(peer, names or NameMap())
    prompt = default_ids(model) if ids is None else list(ids)
    model.check_ids(prompt)
    if peer != LLAMACPP:
        return _capture_self(peer, model, prompt)
    kv_type = {"float16": "f16", "float32": "f32"}.get(np.dtype(model.ops.numerics.kv_dtype).name)
    if kv_type is None:
        raise RequestError("llama.cpp has no float64 KV cache: give --kv-type f16 or f32")
    return capture_llamacpp(
        model.gguf.path,
        prompt,
        kv_type=kv_type,
        n_threads=n_threads,
        n_ubatch=n_ubatch,
        flash_attention=flash_attention,
        repack=repack,
    )


def _capture_self(peer: str, model: Model, ids: list[int]) -> Capture:
    """Our own engine on another device, profile or cache type; what is not said is as in `model`."""
    numerics, kv_type, device = model.ops.numerics.name, None, model.device.name
    for setting in filter(None, peer.partition(":")[2].split(",")):
        if setting in PROFILES:
            numerics = setting
        elif setting in KV_TYPES:
            kv_type = setting
        elif setting.partition(":")[0] in ("cpu", "cuda", "auto", "host"):
            device = setting
        else:
            known = ", ".join([*PROFILES, *KV_TYPES, "cpu", "host", "cuda:N"])
            raise RequestError(f"--peer {peer}: unknown setting {setting!r}; choose among {known}")
    other = refengine.load(model.gguf.path, device, numerics, kv_type=kv_type, cpu_cache_mb=0)
    trace = Trace("")
    other.forward(ids, trace=trace, chunk=len(ids))
    rounding = other.ops.numerics
    return Capture(
        Path(peer),
        f"refengine {refengine.__version__}",
        ids,
        trace.result(),
        numerics=rounding.name,
        flags={"device": other.device.name, "kv_type": np.dtype(rounding.kv_dtype).name},
    )
