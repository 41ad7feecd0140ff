"""The state of one request: its token ids so far, its text, and why it ended. The engine advances it.

Handles text, stop strings and limits. Independent of batches, caches and devices.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from refengine.cache.paged import CacheSequence
from refengine.engine.sampling import SamplingParams, choose_seed
from refengine.engine.stop import StopMatcher
from refengine.errors import RefengineError
from refengine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is the text that can be printed now; it may be empty, and lag behind the ids.

    stop_reason: None except for the last token, which has `eos`, `stop` or `length`.
    logprob, top: natural logarithms of this token's probability and of the most likely tokens' (id, logprob), if
    params.logprobs asks for them.
    """

    id: int
    text: str
    stop_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Score:
    """A token's log-probability given the tokens before it, and the most likely (id, logprob) at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Progress:
    """The engine's own state of a request: its sequence in the KV cache, the keys of its blocks, and counters."""

    cached: CacheSequence = field(default_factory=CacheSequence)
    prefix_keys: list[bytes] = field(default_factory=list)
    prefix_tokens: int = 0  # prompt tokens found in the prefix cache when the request first ran
    preemptions: int = 0


class Generation:
    """A prompt and the tokens generated after it. `Engine.start` makes it, `Engine.tokens` advances it.

    ids: the ids of the prompt and the generated tokens. seed: the seed in use.
    end: None while it runs, then `eos`, `stop`, `length`, `cancelled` or `error` (with the exception in `error`).
    prefill_s: the seconds of the steps before the first token. decode_s: the seconds from the first token to the last.
    prompt_scores: if params ask for them, one for each id of the prompt: None for the first, and before it is computed.
    """

    def __init__(self, ids: Sequence[int], params: SamplingParams, n_limit: int, tokenizer: Tokenizer | None) -> None:
        self.params, self.n_limit = params, n_limit
        self.seed = choose_seed() if params.seed is None else params.seed
        self.ids = list(ids)
        self.n_prompt = len(self.ids)
        self.prompt_scores = self._unscored()
        self.end: str | None = None
        self.error: RefengineError | None = None
        self.progress = Progress()
        self.pending: deque[Token] = deque()  # generated tokens that the caller has not taken yet
        self.prefill_s = 0.0
        self.started = self.last_token = time.perf_counter()
        self.first_token_s: float | None = None
        self._eog = frozenset() if tokenizer is None else tokenizer.eog_ids
        self._detokenizer = None if tokenizer is None else tokenizer.stream(skip_special=True, prompt_ids=self.ids)
        self._stops = StopMatcher(params.stop)

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def decode_s(self) -> float:
        return 0.0 if self.first_token_s is None else self.last_token - self.started - self.first_token_s

    @property
    def wants_scores(self) -> bool:
        """True while prompt log-probabilities are still pending."""
        return self.params.prompt_logprobs is not None and self.n_generated == 0

    def accept(self, token_id: int, score: Score | None = None) -> Token:
        """Append a sampled token to the ids; returns it with the text to print, and a stop reason if it is the last."""
        self.ids.append(token_id)
        text, reason = self._text_of(token_id)
        self.end = reason
        scored = () if score is None else (score.logprob, score.top)
        token = Token(token_id, text, reason, *scored)
        self.pending.append(token)
        return token

    def forked(self, params: SamplingParams) -> Generation:
        """A copy with the same ids and text so far, but its own parameters and seed."""
        other = copy.copy(self)
        other.params, other.seed = params, choose_seed() if params.seed is None else params.seed
        other.ids, other.pending, other.progress = list(self.ids), deque(), Progress()
        other.prompt_scores = list(self.prompt_scores) or other._unscored()
        other._detokenizer = None if self._detokenizer is None else self._detokenizer.copy()
        other._stops = copy.copy(self._stops)
        return other

    def _unscored(self) -> list[Score | None]:
        return [] if self.params.prompt_logprobs is None else [None] * self.n_prompt

    def _text_of(self, token_id: int) -> tuple[str, str | None]:
        if token_id in self._eog:
            return self._rest(""), self._reason("eos")
        piece = "" if self._detokenizer is None else self._detokenizer.push(token_id)
        text, stopped = self._stops.push(piece)
        if stopped:
            return text, "stop"
        if self.n_generated >= self.n_limit:
            return self._rest(text), self._reason("length")
        return text, None

    def _rest(self, text: str) -> str:
        """The text followed by all text that was held back."""
        more, stopped = self._stops.push("" if self._detokenizer is None else self._detokenizer.finish())
        return text + more + ("" if stopped else self._stops.finish())

    def _reason(self, reason: str) -> str:
        return "stop" if self._stops.stopped else reason
