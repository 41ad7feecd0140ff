"""A model: a file, a device and a numerics profile, ready to run. It knows nothing of the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refengine.cache.paged import CacheSequence, KVCache
from refengine.config import ModelConfig
from refengine.device import Device, MemoryAccount
from refengine.errors import RequestError
from refengine.gguf.file import GGUFFile
from refengine.models import BY_ARCHITECTURE
from refengine.ops.dequant import Dequantized
from refengine.tokenizer import Tokenizer
from refengine.trace import Tracer, no_trace, to_numpy

PACKAGED_MODEL = Path(__file__).parent / "data" / "haiku-q4_k_m.gguf"  # our own: trained by tools/haiku
PREFILL_CHUNK = 512  # tokens a forward call, llama.cpp's default micro-batch


class Model:
    """A loaded model. `config`, `vocabulary` (None without one), `weights`, `gguf`, `ops`, `device`.

    make_runner: makes the runner of an engine from (model, cache, max_batch, graphs, trace); `load` hands it in. None
                 means array code.
    memory:      accounts for the memory of a device that runs kernels; None where arrays are used.
    dequantized: how many weights were dequantised at load, and how long that took; None where that is left for later.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        weights: Any,
        ops: Any,
        device: Device,
        n_ctx: int | None = None,
        *,
        make_runner: Callable[..., Any] | None = None,
        memory: MemoryAccount | None = None,
        dequantized: Dequantized | None = None,
    ) -> None:
        self.gguf, self.config, self.vocabulary = gguf, config, tokenizer
        self.weights, self.ops, self.device = weights, ops, device
        self.make_runner, self.memory, self.dequantized = make_runner, memory, dequantized
        self.n_ctx = n_ctx or config.n_ctx_train
        architecture = BY_ARCHITECTURE[config.arch]
        self._forward = architecture.forward
        self.decode = getattr(architecture, "decode", None)  # its fused step, where it has one

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

    def evaluate(
        self,
        parts: Sequence[tuple[CacheSequence, Sequence[int]]],
        cache: KVCache,
        rows: Sequence[int] | None = None,
        trace: Tracer = no_trace,
    ) -> Any:
        """One forward pass over new tokens of one or more sequences; logits (n_out, n_vocab) on the device.

        parts: sequences with the ids to append to each. rows: batch rows whose logits are wanted (default: all).
        The keys and values are written, but the positions belong to the sequences only after `cache.commit(parts)`.
        """
        batch = cache.batch(parts, rows)
        # Values out of range (a NaN on its way through float16, say) are the watch's business, not NumPy's warnings.
        with np.errstate(all="ignore"), self.ops.workspace():
            return self._forward(self.config, self.weights, batch, cache, self.ops, trace)

    def step(
        self,
        parts: Sequence[tuple[CacheSequence, Sequence[int]]],
        cache: KVCache,
        rows: Sequence[int] | None = None,
        trace: Tracer = no_trace,
    ) -> Any:
        """As `evaluate`, and commits the new positions: for callers that have a cache and no engine."""
        logits = self.evaluate(parts, cache, rows, trace)
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
