"""One job: its parameters, its progress, and the events that have not been sent to its client yet.

Only the event loop's thread changes a job. The engine's thread only reads the job that `submit` passed to it.
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

Event = tuple[str, dict[str, Any]]  # an event's name and data


class Job:
    """A request for the generation of one sequence, and its progress. All routes make the same kind of job.

    encode: tokenizes the prompt, which may take long. prompt_facts: the fields of the prompt that may be logged.
    params: max_tokens is the worker's limit if the client gives none; `Worker.accept` chooses a seed if there is none.
    answer_id: the id of the answer that this job is a part of; cancelling the answer ends all its jobs. None: the
    answer has no other job.
    field: the name of the request's field that holds the prompt, for error messages.
    ids, timeout_s: the token ids of the prompt and the time limit in seconds; set before the engine gets the job.
    preparing: the task that tokenizes the prompt and submits the job to the engine.
    queue_position: a future for the job's place in the engine's queue (0: it runs at once). If the job ends before the
    engine has accepted it, the future has the WorkerError as its exception.
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
        self.last_metrics: float | None = None  # when the last `metrics` event was sent
        self._events: deque[Event] = deque()
        self._withheld: list[dict[str, Any]] = []  # tokens with log-probabilities that may belong to a stop string
        self._wake = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self.outcome is None

    @property
    def first_token_ms(self) -> float | None:
        """Milliseconds from the acceptance of the job to its first token."""
        return None if self.first_token is None else round((self.first_token - self.arrived) * 1000, 3)

    @property
    def decode_time_ms(self) -> float:
        """Milliseconds from the first token to the last."""
        return 0.0 if self.first_token is None else round((self.last_token - self.first_token) * 1000, 3)

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Queue an event for the client."""
        self._events.append((event, data))
        self._wake.set()

    def emit_token(self, token: Token, drawn: float, tokenizer: Tokenizer) -> None:
        """Queue a token for the client. drawn: the time when it was sampled, as time.perf_counter() gives it."""
        if self.first_token is None:
            self.first_token = drawn
        self.last_token = drawn
        data: dict[str, Any] = {"t": token.text, "i": self.tokens_out}
        self.tokens_out += 1
        if token.logprob is None:
            self.emit("token", data)
            return
        self._withheld.append({**data, **scored(token.id, token, tokenizer)})
        stopped = token.stop_reason == "stop"
        if self.params.stop and not token.text and token.stop_reason is None:
            return  # it may belong to a stop string, whose text and token ids are not sent to the client
        for withheld in self._withheld:
            self.emit("token", {"t": "", "i": withheld["i"]} if stopped and not token.text else withheld)
        self._withheld.clear()

    async def events(self) -> list[Event] | None:
        """Wait for events and return all that are ready, at least one. Returns None after the last event."""
        while not self._events:
            if not self.alive:
                return None
            self._wake.clear()
            await self._wake.wait()
        ready = list(self._events)
        self._events.clear()
        return ready

    def close(self, outcome: str) -> None:
        """End the job. Its last event must be queued already."""
        self.outcome = outcome
        for pending in (self.timer, self.preparing):
            if pending is not None:
                pending.cancel()
        self._wake.set()


def scored(token_id: int, score: Token | Score | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON of a token with its log-probabilities. score: None for a prompt's first token, which has none."""

    def entry(i: int, logprob: float | None) -> dict[str, Any]:
        return {"id": i, "token": tokenizer.token_text(i), "logprob": None if logprob is None else _finite(logprob)}

    top = () if score is None else score.top
    return {**entry(token_id, None if score is None else score.logprob), "top": [entry(*pair) for pair in top]}


def _finite(logprob: float) -> float | None:
    """None for -infinity, the log-probability of a token that cannot be sampled: JSON has no infinity."""
    return logprob if logprob > float("-inf") else None
