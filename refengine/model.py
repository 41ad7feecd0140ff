"""A model: a file, a device and a numerics profile, ready to run. It knows nothing of the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refengine.cache.paged import CacheSequence, KVCache
from refengine.config import ModelConfig
from refengine.device import Device, MemoryAccount
from refengine.errors import RequestError
from refengine.gguf.file import GGUFFile
from refengine.models import BY_ARCHITECTURE
from refengine.ops.dequant import Dequantized
from refengine.tokenizer import Tokenizer
from refengine.trace import Trace, Tracer, check_known, no_trace, to_numpy

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
        self._tensor_names: frozenset[str] | None = None  # of a forward pass, once they were wanted
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

    def forward(
        self,
        ids: ArrayLike,
        *,
        trace: Tracer = no_trace,
        chunk: int = PREFILL_CHUNK,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Logits of every position of a prompt, (n, n_vocab) in the profile's type, fed `chunk` tokens at a time.

        ids: a sequence, array or tensor of one axis. progress: called with the number of tokens after each chunk.
        Raises `RequestError` for ids that are none, not one list of integers, outside the vocabulary, or more than the
        context holds; `TraceError`, before anything is computed, where the trace names a tensor that does not exist.
        """
        prompt = listed_ids(ids)
        self.check_ids(prompt)
        if chunk < 1:
            raise RequestError(f"chunk {chunk} must be at least 1 token")
        self.check_trace(trace)
        cache, sequence = self.new_cache(len(prompt)), CacheSequence()
        parts = []
        for i in range(0, len(prompt), chunk):
            new = prompt[i : i + chunk]
            parts.append(to_numpy(self.step([(sequence, new)], cache, trace=trace)))
            if progress is not None:
                progress(len(new))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def check_trace(self, trace: Tracer) -> None:
        """Raise `TraceError` where a trace breaks at or replaces a tensor that this model does not have.

        The names are those of a forward pass of one token, which is made when they are first wanted.
        """
        if not isinstance(trace, Trace) or not trace.wanted:
            return
        if self._tensor_names is None:
            seen = Trace()
            self.step([(CacheSequence(), [0])], self.new_cache(1), trace=seen)
            self._tensor_names = frozenset(seen.seen)
        check_known(trace.wanted, self._tensor_names)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt: text is encoded with the specials the metadata asks for, ids are taken as they are."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else listed_ids(prompt)

    def check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        wrong = [i for i in ids if not 0 <= i < self.config.n_vocab]
        if wrong:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {self.config.n_vocab}", "prompt")
        if len(ids) > self.n_ctx:
            raise RequestError(f"the prompt has {len(ids)} tokens, the context holds {self.n_ctx}", "prompt")


def listed_ids(ids: Any) -> list[int]:
    """Token ids of one axis as a list: from a list, a NumPy or CuPy array, a torch tensor.

    Raises `RequestError` for text, and for what is not one list of integers.
    """
    if isinstance(ids, str | bytes):
        raise RequestError("the prompt is text where token ids are wanted: encode it first (model.tokenizer.encode)")
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, Iterable):
        raise RequestError(f"the prompt is {type(ids).__name__}, expected one list of token ids")
    listed = list(ids)
    for i in listed:
        if isinstance(i, bool) or not isinstance(i, Integral):
            raise RequestError(f"the prompt has {i!r:.60} among its token ids, expected one list of integers")
    return [int(i) for i in listed]
