"""Captures the tensors of the engine named by `--peer`: llama.cpp, refengine with other settings, or a dump."""

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
DEFAULT_TOKENS = 32  # length of the default prompt for a model without vocabulary


def is_dump(peer: str) -> bool:
    """Whether this peer is a dump, which contains its prompt."""
    return peer != LLAMACPP and peer.partition(":")[0] != SELF


def default_ids(model: Model) -> list[int]:
    """The default prompt: a sentence with numbers, accents and punctuation, or without a vocabulary ids 1, 2, 3 …"""
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
    """The tensors that `peer` computes for a prompt.

    peer:  `llama.cpp`; `refengine:SETTING,…` with numerics profiles, KV types and devices as settings
           (`refengine:exact64`, `refengine:cuda,f16`); or the path of a dump, which contains its prompt.
    names: the name map of a dump. The other arguments are those of `LlamaCpp`.
    Raises RequestError for an unknown setting or invalid ids, DumpError, and the errors of the engines.
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
    """The capture of our own engine with another device, profile or KV type; other settings are those of `model`."""
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
