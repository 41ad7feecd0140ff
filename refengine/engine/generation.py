"""One sequence from prompt to end: prefill, then token after token.

`start → next_token → free` on one model; batching several sequences is the scheduler's business, not this file's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refengine.engine.sampling import SamplingParams, choose_seed, sample
from refengine.engine.stop import StopMatcher
from refengine.errors import RequestError
from refengine.kv_cache import KVCache
from refengine.kv_cache import Sequence as CacheSequence
from refengine.trace import Tracer, no_trace, to_numpy


class RunnableModel(Protocol):
    """What a generation needs of a model."""

    config: Any
    tokenizer: Any
    n_ctx: int

    def check_ids(self, ids: Sequence[int]) -> None: ...
    def new_cache(self, n_tokens: int, n_sequences: int = 1) -> KVCache: ...
    def step(self, parts: Any, cache: KVCache, rows: Any = None, trace: Tracer = no_trace) -> Any: ...


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what may be printed now; it may be empty, and lag behind the ids.

    stop_reason is None until the last token: then `eos`, `stop` or `length`.
    """

    id: int
    text: str
    stop_reason: str | None = None


class Generation(Iterator[Token]):
    """Tokens that follow `prompt_ids`. Iterate, or call `next_token` until its `stop_reason` is set; then `free`.

    seed: the one in use (drawn when `params.seed` is None). prefill_s, decode_s: seconds spent so far.
    Raises `RequestError` for a prompt that is empty, out of the vocabulary or fills the context.
    """

    def __init__(
        self,
        model: RunnableModel,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        chunk: int = 512,
        trace: Tracer = no_trace,
    ) -> None:
        model.check_ids(prompt_ids)
        if len(prompt_ids) >= model.n_ctx:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and fills the context of {model.n_ctx}: no room for an answer"
            )
        tokenizer = model.tokenizer
        params.check_for_model(
            model.config.n_vocab, lambda text: len(tokenizer.encode(text, add_special=False)) if tokenizer else 0
        )
        if params.stop and tokenizer is None:
            raise RequestError("stop strings need a vocabulary, and this model has none")
        self.model, self.params, self.trace = model, params, trace
        self.seed = choose_seed() if params.seed is None else params.seed
        self.ids = list(prompt_ids)
        self.n_prompt = len(prompt_ids)
        self.n_limit = min(params.max_tokens, model.n_ctx - self.n_prompt)
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self._chunk = chunk
        self._cache = model.new_cache(self.n_prompt + self.n_limit)
        self._sequence = CacheSequence()
        self._detokenizer = None if tokenizer is None else tokenizer.stream(skip_special=True, prompt_ids=prompt_ids)
        self._stops = StopMatcher(params.stop)
        self._done = False

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    def __next__(self) -> Token:
        if self._done:
            raise StopIteration
        return self.next_token()

    def next_token(self) -> Token:
        """Run the model over what it has not seen, draw one token, and say what can be printed."""
        start = time.perf_counter()
        logits = self._advance()
        index = self.n_generated
        token_id = sample(logits, self.params, self.ids, self.seed, index)
        self.ids.append(token_id)
        elapsed = time.perf_counter() - start
        if index == 0:
            self.prefill_s += elapsed
        else:
            self.decode_s += elapsed
        return self._emit(token_id)

    def free(self) -> None:
        """Give the cache blocks back. Harmless when repeated."""
        self._done = True
        self._cache.free(self._sequence)

    def _advance(self) -> np.ndarray:
        """Feed the ids that are not in the cache yet, in chunks; the logits after the last: (n_vocab,)."""
        logits: Any = None
        while self._sequence.length < len(self.ids):
            chunk = self.ids[self._sequence.length : self._sequence.length + self._chunk]
            logits = self.model.step([(self._sequence, chunk)], self._cache, [len(chunk) - 1], self.trace)
        return to_numpy(logits)[0]

    def _emit(self, token_id: int) -> Token:
        tokenizer = self.model.tokenizer
        if tokenizer is not None and token_id in tokenizer.eog_ids:
            return self._end(token_id, "", "eos")
        piece = "" if self._detokenizer is None else self._detokenizer.push(token_id)
        text, stopped = self._stops.push(piece)
        if stopped:
            self._done = True
            return Token(token_id, text, "stop")
        if self.n_generated >= self.n_limit:
            return self._end(token_id, text, "length")
        return Token(token_id, text)

    def _end(self, token_id: int, text: str, reason: str) -> Token:
        """The last token, with whatever was held back."""
        self._done = True
        rest = "" if self._detokenizer is None else self._detokenizer.finish()
        more, stopped = self._stops.push(rest)
        tail = "" if stopped else self._stops.finish()
        return Token(token_id, text + more + tail, "stop" if stopped else reason)
