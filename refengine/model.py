"""A model is a file on a device with a numerics profile, ready to run. Independent of the engine that runs it."""

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

PACKAGED_MODEL = Path(__file__).parent / "data" / "haiku-q4_k_m.gguf"  # trained by tools/haiku
PREFILL_CHUNK = 512  # prompt tokens per forward pass, llama.cpp's default micro-batch


class Model:
    """A loaded model: `config`, `vocabulary` (None if the file has none), `weights`, `gguf`, `ops`, `device`.

    make_runner: makes an engine's runner from (model, cache, max_batch, graphs, trace); given by `load`. None means
                 array code.
    memory:      accounts for the device memory of the kernels; None for array code.
    dequantized: how many weights were dequantised at load, and how long it took; None if none were.
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
        self._tensor_names: frozenset[str] | None = None  # of a forward pass; made when they are first needed
        self.decode = getattr(architecture, "decode", None)  # the fused decode step, if the architecture has one

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError if the model's file has no vocabulary."""
        if self.vocabulary is None:
            raise RequestError(f"{self.gguf.path} has no vocabulary: give the prompt as ids (--ids 1,2,3)")
        return self.vocabulary

    def new_cache(self, n_tokens: int, n_sequences: int = 1) -> KVCache:
        """A KV cache for `n_sequences` sequences of `n_tokens` tokens each."""
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
        """One forward pass over new tokens of one or more sequences; returns logits (n_out, n_vocab) on the device.

        parts: sequences with the ids to append to each. rows: batch rows whose logits are needed (default: all).
        The keys and values are written, but the positions belong to the sequences only after `cache.commit(parts)`.
        """
        batch = cache.batch(parts, rows)
        # No NumPy warnings about NaN or overflow: a trace with `watch` reports them.
        with np.errstate(all="ignore"), self.ops.workspace():
            return self._forward(self.config, self.weights, batch, cache, self.ops, trace)

    def step(
        self,
        parts: Sequence[tuple[CacheSequence, Sequence[int]]],
        cache: KVCache,
        rows: Sequence[int] | None = None,
        trace: Tracer = no_trace,
    ) -> Any:
        """Like `evaluate`, and also commits the new positions. For callers that have a cache but no engine."""
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
        """The logits of every position of a prompt, (n, n_vocab) in the profile's type.

        ids: a one-dimensional sequence, array or tensor. chunk: the number of tokens in one forward pass.
        progress: called after each chunk with its number of tokens.
        Raises `RequestError` if ids are empty, not one list of integers, outside the vocabulary, or longer than the
        context; `TraceError`, before anything is computed, if the trace names a tensor that does not exist.
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
        """Raise `TraceError` if a trace breaks at or replaces a tensor that this model does not have.

        The first call runs a forward pass of one token to find the names of the tensors.
        """
        if not isinstance(trace, Trace) or not trace.wanted:
            return
        if self._tensor_names is None:
            recorder = Trace()
            self.step([(CacheSequence(), [0])], self.new_cache(1), trace=recorder)
            self._tensor_names = frozenset(recorder.seen)
        check_known(trace.wanted, self._tensor_names)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt: text is encoded with the special tokens that the metadata demand, ids stay unchanged."""
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else listed_ids(prompt)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise RequestError if ids are empty, outside the vocabulary, or longer than the context."""
        if len(ids) == 0:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        wrong = [i for i in ids if not 0 <= i < self.config.n_vocab]
        if wrong:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {self.config.n_vocab}", "prompt")
        if len(ids) > self.n_ctx:
            raise RequestError(f"the prompt has {len(ids)} tokens, but the context has {self.n_ctx}", "prompt")


def listed_ids(ids: Any) -> list[int]:
    """Token ids as a list of int, from a one-dimensional sequence, NumPy or CuPy array, or torch tensor.

    Raises `RequestError` for text, and for anything but one list of integers.
    """
    if isinstance(ids, str | bytes):
        raise RequestError("the prompt is text, expected token ids: encode it first (model.tokenizer.encode)")
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, Iterable):
        raise RequestError(f"the prompt is {type(ids).__name__}, expected one list of token ids")
    listed = list(ids)
    for i in listed:
        if isinstance(i, bool) or not isinstance(i, Integral):
            raise RequestError(f"the prompt has {i!r:.60} among its token ids, expected one list of integers")
    return [int(i) for i in listed]
