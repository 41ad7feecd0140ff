"""One request: the ids so far, what may be printed, and why it ended. The engine moves it forward.

Knows of text, stop strings and limits; nothing of batches, caches and devices.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from refengine.cache.paged import CacheSequence
from refengine.engine.sampling import SamplingParams, choose_seed
from refengine.engine.stop import StopMatcher
from refengine.errors import RefengineError

if TYPE_CHECKING:
    from refengine.engine.engine import Engine


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what may be printed now; it may be empty, and lag behind the ids.

    stop_reason is None until the last token: then `eos`, `stop` or `length`.
    logprob, top: natural logarithms, of this token and of the likeliest (id, logprob); where params.logprobs asks.
    """

    id: int
    text: str
    stop_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Score:
    """Of a prompt's token, given those before it: its log-probability, and the likeliest (id, logprob) in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Progress:
    """What the engine keeps of a request: its place in the cache, keys of its blocks, and counts."""

    cached: CacheSequence = field(default_factory=CacheSequence)
    prefix_keys: list[bytes] = field(default_factory=list)
    prefix_tokens: int = 0  # of the prompt that the prefix cache had when it first ran
    preemptions: int = 0


class Generation(Iterator[Token]):
    """Tokens that follow a prompt, made by `Engine.start`. Iterate, or call `Engine.next_token`; then `free`.

    ids: prompt and generated. seed: the one in use. end: None while it runs, then `eos`, `stop`, `length`, `cancelled`
    or `error` (which `error` holds). prefill_s, decode_s: seconds of the steps before and after the first token.
    prompt_scores: one for each id of the prompt, None for the first and until it is computed; where params ask.
    """

    def __init__(self, engine: Engine, ids: Sequence[int], params: SamplingParams, n_limit: int) -> None:
        self.engine, self.params, self.n_limit = engine, params, n_limit
        self.seed = choose_seed() if params.seed is None else params.seed
        self.ids = list(ids)
        self.n_prompt = len(self.ids)
        self.prompt_scores = self._unscored()
        self.end: str | None = None
        self.error: RefengineError | None = None
        self.progress = Progress()
        self.pending: deque[Token] = deque()  # drawn, and not yet asked for
        self.prefill_s = self.decode_s = 0.0
        self.started = self.last_token = time.perf_counter()
        self.first_token_s: float | None = None
        tokenizer = engine.model.vocabulary
        self._eog = frozenset() if tokenizer is None else tokenizer.eog_ids
        self._detokenizer = None if tokenizer is None else tokenizer.stream(skip_special=True, prompt_ids=self.ids)
        self._stops = StopMatcher(params.stop)

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def wants_scores(self) -> bool:
        """Of its prompt; they are all there before its first token."""
        return self.params.prompt_logprobs is not None and self.n_generated == 0

    def __next__(self) -> Token:
        if self.end is not None and not self.pending and self.error is None:
            raise StopIteration
        return self.engine.next_token(self)

    def free(self) -> None:
        """Stop, and give the cache blocks back. Harmless when repeated."""
        self.engine.free(self)

    def accept(self, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> Token:
        """The drawn token joins the ids; what may be printed, and whether it is the last."""
        self.ids.append(token_id)
        text, reason = self._text_of(token_id)
        self.end = reason
        token = Token(token_id, text, reason, logprob, top)
        self.pending.append(token)
        return token

    def forked(self, params: SamplingParams) -> Generation:
        """Another one with the same ids and text so far, its own parameters, seed and future."""
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
        """With whatever was held back."""
        more, stopped = self._stops.push("" if self._detokenizer is None else self._detokenizer.finish())
        return text + more + ("" if stopped else self._stops.finish())

    def _reason(self, reason: str) -> str:
        return "stop" if self._stops.stopped else reason
