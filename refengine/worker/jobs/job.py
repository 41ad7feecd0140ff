"""One request on its way: what the event loop knows of it, and the events that its client is still to be sent.

Lives in the event loop's thread alone; the engine's thread only reads what `submit` handed over.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from refengine.engine.generation import Score, Token
from refengine.engine.sampling import SamplingParams
from refengine.tokenizer import Tokenizer

Event = tuple[str, dict[str, Any]]  # its name and data


class Job:
    """What a client asks for, whatever the route, and how far it has come.

    encode: makes the prompt's ids, which may take its time. prompt_facts: what may be logged of the prompt.
    params: max_tokens is the worker's limit if the client names none; `Worker.accept` draws a seed if it has none.
    answer_id: the answer that the job is a part of, whose cancellation ends all its jobs. None: it is the only part.
    field: the request's field that holds the prompt, for error messages.
    ids, timeout_s: set before the engine sees the job.
    preparing: the task that makes the ids and hands the job to the engine.
    queue_position: done when the engine has the job (0 runs at once); failed with the WorkerError that ended it before.
    outcome: None while the job is alive, then one of metrics.OUTCOMES.
    """

    def __init__(
        self,
        job_id: str,
        encode: Callable[[], list[int]],
        params: SamplingParams,
        prompt_facts: dict[str, Any],
        answer_id: str | None = None,
        field: str = "prompt",
    ) -> None:
        self.job_id, self.encode, self.params, self.prompt_facts = job_id, encode, params, prompt_facts
        self.answer_id, self.field = answer_id, field
        self.arrived = time.perf_counter()
        self.timeout_s = math.inf
        self.ids: Sequence[int] = ()
        self.queue_position: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.preparing: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.outcome: str | None = None
        self.tokens_out = 0
        self.first_token: float | None = None
        self.last_token = 0.0
        self.last_metrics: float | None = None  # when figures were last sent
        self._events: deque[Event] = deque()
        self._silent: list[dict[str, Any]] = []  # scored tokens whose text is held back
        self._wake = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self.outcome is None

    @property
    def first_token_ms(self) -> float | None:
        """From accept."""
        return None if self.first_token is None else round((self.first_token - self.arrived) * 1000, 3)

    @property
    def decode_time_ms(self) -> float:
        """From the first token to the last."""
        return 0.0 if self.first_token is None else round((self.last_token - self.first_token) * 1000, 3)

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Queue an event for the client."""
        self._events.append((event, data))
        self._wake.set()

    def emit_token(self, token: Token, drawn: float, tokenizer: Tokenizer) -> None:
        """drawn: when, on the clock of perf_counter."""
        if self.first_token is None:
            self.first_token = drawn
        self.last_token = drawn
        data: dict[str, Any] = {"t": token.text, "i": self.tokens_out}
        self.tokens_out += 1
        if token.logprob is None:
            self.emit("token", data)
            return
        self._silent.append({**data, **scored(token.id, token, tokenizer)})
        stopped = token.stop_reason == "stop"
        if self.params.stop and not token.text and token.stop_reason is None:
            return  # it may be of a stop string, of which nothing is told: not even which tokens it was made of
        for one in self._silent:
            self.emit("token", {"t": "", "i": one["i"]} if stopped and not token.text else one)
        self._silent.clear()

    async def events(self) -> list[Event] | None:
        """Everything that is ready to be sent, at least one event; None after the last."""
        while not self._events:
            if not self.alive:
                return None
            self._wake.clear()
            await self._wake.wait()
        ready = list(self._events)
        self._events.clear()
        return ready

    def close(self, outcome: str) -> None:
        """The last event is queued; nothing more will come."""
        self.outcome = outcome
        for under_way in (self.timer, self.preparing):
            if under_way is not None:
                under_way.cancel()
        self._wake.set()


def scored(token_id: int, score: Token | Score | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is sent of a token where log-probabilities are asked for. None: it has none, the first of a prompt."""

    def entry(i: int, logprob: float | None) -> dict[str, Any]:
        return {"id": i, "token": tokenizer.token_text(i), "logprob": None if logprob is None else _finite(logprob)}

    top = () if score is None else score.top
    return {**entry(token_id, None if score is None else score.logprob), "top": [entry(*pair) for pair in top]}


def _finite(logprob: float) -> float | None:
    """JSON has no -infinity, the log-probability of a token that cannot be drawn."""
    return logprob if logprob > float("-inf") else None
