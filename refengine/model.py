"""`load(path) -> Model`: the Python API. A model is a file, a device and a numerics profile, ready to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refengine.cache.paged import CacheSequence, KVCache
from refengine.config import ModelConfig
from refengine.cuda import open_kernels
from refengine.device import Device, open_device
from refengine.engine.engine import single_sequence
from refengine.engine.generation import Token
from refengine.engine.sampling import SamplingParams
from refengine.errors import RequestError
from refengine.gguf.file import GGUFFile
from refengine.hub.files import resolve
from refengine.models import BY_ARCHITECTURE
from refengine.ops import Ops, profile
from refengine.tokenizer import Tokenizer, load_tokenizer
from refengine.trace import Tracer, no_trace, to_numpy
from refengine.weights import ArrayPlacement, check_tensors, load_weights

PACKAGED_MODEL = Path(__file__).parent / "data" / "haiku-q4_k_m.gguf"  # our own: trained by tools/haiku
PREFILL_CHUNK = 512  # tokens a forward call, llama.cpp's default micro-batch


def load(
    path: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    numerics: str | None = None,
    *,
    kv_type: str | None = None,
    n_ctx: int | None = None,
    cpu_cache_mb: int | None = None,
    attention: str = "flash",
    progress: Callable[[int, int], None] | None = None,
    copied: bool = False,
    copy_chunk_kb: int = 1024,
) -> Model:
    """Open a GGUF file (the first part of a split one) and put its tensors on a device.

    path:         None opens the packaged model, which writes haiku. As text also a name of the hub, which is
                  downloaded into its cache: `hf:OWNER/REPO[@REVISION][:QUANT or FILE.gguf]`.
    device:       `cpu`, `cuda`, `cuda:N`, `auto`; `host` runs the kernels on the CPU, to test and step through.
    numerics:     `exact` (float32), `exact64`, `llamacpp`, `fast`; default: fast on cuda and host, else exact. On a
                  GPU fast means raw kernels and weights as stored; every other profile, array code.
    kv_type:      `f16`, `f32` or `f64` instead of the profile's.
    n_ctx:        longest sequence in tokens (default: the model's context length).
    cpu_cache_mb: MiB of dequantised weights to keep (default: half of the device's memory).
    attention:    `flash`, or `reference` for array code that writes the score matrix. Kernels only: to compare.
    progress:     called with the bytes done and the bytes in all.
    copied:       on the CPU, weights are read into memory at once and not mapped: whatever happens to the file later,
                  they stay as they are.
    copy_chunk_kb: KiB of a copy to a GPU: what it needs of host memory does not grow with the model.
    Raises `GGUFError`, `ModelError`, `TokenizerError`, `DeviceError`, `HubError` or `RequestError`.
    """
    if n_ctx is not None and not 1 <= n_ctx < 2**31:
        raise RequestError(f"n_ctx {n_ctx} is outside 1..{2**31 - 1} tokens")
    if cpu_cache_mb is not None and cpu_cache_mb < 0:
        raise RequestError(f"cpu_cache_mb {cpu_cache_mb} must not be negative")
    if not 1 <= copy_chunk_kb <= 1 << 20:
        raise RequestError(f"copy_chunk_kb {copy_chunk_kb} is outside 1..{1 << 20} KiB")
    if attention not in ("flash", "reference"):
        raise RequestError(f"attention {attention!r}: choose flash or reference")
    opened = open_device(device)
    rounding = profile(numerics or ("exact" if opened.name == "cpu" else "fast"), kv_type)
    if opened.name == "host" and not rounding.half_rows:
        raise RequestError(f"device host runs the kernels, whose numerics are fast; {rounding.name} runs on cpu")
    gguf = GGUFFile(PACKAGED_MODEL if path is None else resolve(path))
    config = ModelConfig.from_gguf(gguf)
    if n_ctx is not None and n_ctx > config.n_ctx_train and config.rope is None:
        raise RequestError(f"n_ctx {n_ctx}: {config.arch} has learned positions, only {config.n_ctx_train} of them")
    tokenizer = load_tokenizer(gguf)
    architecture = BY_ARCHITECTURE[config.arch]
    specs = architecture.tensors(config)
    if rounding.half_rows and opened.name != "cpu":
        check_tensors(gguf, specs)
        kernels = open_kernels(opened, gguf.tensors.values(), attention, copy_chunk_kb << 10)
        ops: Any = kernels.ops
        with kernels.memory.workspace():
            weights = load_weights(gguf, specs, config.n_layer, kernels.uploader, progress)
        kernels.memory.trim()
    else:
        cache_bytes = default_cache_bytes(opened) if cpu_cache_mb is None else cpu_cache_mb << 20
        ops = Ops(opened.xp, rounding, cache_bytes)
        place = ArrayPlacement(opened.xp, copied, copy_chunk_kb << 10)
        weights = load_weights(gguf, specs, config.n_layer, place, progress)
    return Model(gguf, config, tokenizer, weights, ops, opened, n_ctx)


def default_cache_bytes(device: Device) -> int:
    """Half of the memory of the device (of the machine, for the CPU)."""
    if device.xp is not np:
        return int(device.xp.cuda.runtime.memGetInfo()[1]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Model:
    """A loaded model. `config`, `vocabulary` (None without one), `weights`, `gguf`, `ops`, `device`."""

    def __init__(
        self,
        gguf: GGUFFile,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        weights: Any,
        ops: Any,
        device: Device,
        n_ctx: int | None = None,
    ) -> None:
        self.gguf, self.config, self.vocabulary = gguf, config, tokenizer
        self.weights, self.ops, self.device = weights, ops, device
        self.n_ctx = n_ctx or config.n_ctx_train
        self._forward = BY_ARCHITECTURE[config.arch].forward

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError for a model whose file has no vocabulary."""
        if self.vocabulary is None:
            raise RequestError(f"{self.gguf.path} has no vocabulary: give the prompt as ids (--ids 1,2,3)")
        return self.vocabulary

    def new_cache(self, n_tokens: int, n_sequences: int = 1) -> KVCache:
        """A KV cache with room for `n_sequences` sequences of `n_tokens` tokens each."""
        cfg = self.config
        return KVCache(
            self.ops.kv_arrays,
            cfg.n_layer,
            cfg.n_head_kv,
            cfg.head_dim,
            n_ctx=self.n_ctx,
            n_blocks=KVCache.blocks_for(n_tokens) * n_sequences,
            copy_block=self.ops.kv_copy,
        )

    def step(
        self,
        parts: Sequence[tuple[CacheSequence, Sequence[int]]],
        cache: KVCache,
        rows: Sequence[int] | None = None,
        trace: Tracer = no_trace,
    ) -> Any:
        """One forward pass over new tokens of one or more sequences; logits (n_out, n_vocab) on the device."""
        batch = cache.batch(parts, rows)
        # Values out of range (a NaN on its way through float16, say) are the watch's business, not NumPy's warnings.
        with np.errstate(all="ignore"), self.ops.workspace():
            logits = self._forward(self.config, self.weights, batch, cache, self.ops, trace)
        cache.commit(parts)
        return logits

    def forward(self, ids: Sequence[int], *, trace: Tracer = no_trace, chunk: int = PREFILL_CHUNK) -> np.ndarray:
        """Logits of every position of a prompt, (n, n_vocab) in the profile's type, fed `chunk` tokens at a time.

        Raises `RequestError` for no ids, an id outside the vocabulary, or more ids than the context holds.
        """
        self.check_ids(ids)
        if chunk < 1:
            raise RequestError(f"chunk {chunk} must be at least 1 token")
        cache, sequence = self.new_cache(len(ids)), CacheSequence()
        parts = [
            to_numpy(self.step([(sequence, ids[i : i + chunk])], cache, trace=trace)) for i in range(0, len(ids), chunk)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Token]:
        """Tokens that follow a prompt (text, or ids taken as they are), one by one.

        `Token.text` is what may be printed: whole code points, nothing of a stop string. Ends at an end-of-generation
        token, a stop string, `params.max_tokens` or the end of the context; `Token.stop_reason` of the last says which.
        """
        generation = single_sequence(self, self.prompt_ids(prompt), params)
        try:
            yield from generation
        finally:
            generation.free()

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt: text is encoded with the specials the metadata asks for, ids are taken as they are."""
        if not isinstance(prompt, str):
            return [int(i) for i in prompt]
        return self.tokenizer.encode(prompt)

    def check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        wrong = [i for i in ids if not 0 <= i < self.config.n_vocab]
        if wrong:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {self.config.n_vocab}", "prompt")
        if len(ids) > self.n_ctx:
            raise RequestError(f"the prompt has {len(ids)} tokens, the context holds {self.n_ctx}", "prompt")
