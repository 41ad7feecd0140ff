"""The events of a worker's streams as typed objects, and the client's errors. Does not depend on connections.

A decoder takes the server-sent events of one stream in order. It raises ProtocolError if a stream breaks the rules:
`started` comes first, token indexes have no gap, and there is one last event. Unknown events and fields are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from httpx_sse import ServerSentEvent

from refengine.errors import RefengineError, one_line

# The codes of errors that may be retried: `error` events say whether they are, HTTP responses do not.
RETRIABLE = {"VRAM_OOM", "CUDA_ERROR", "INFERENCE_TIMEOUT", "QUEUE_FULL", "SHUTTING_DOWN"}
SHOWN = 80  # how many characters of malformed data an error quotes


class ClientError(RefengineError):
    """Base class of the client's errors."""


class WorkerError(ClientError):
    """The worker refused a request, or ended it with an error.

    status: the HTTP status; None if the stream had already begun. retry_after: seconds to wait before a retry.
    """

    def __init__(
        self,
        code: str,
        message: str,
        retriable: bool = False,
        field: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.retriable = code, message, retriable
        self.field, self.status, self.retry_after = field, status, retry_after


class ConnectionFailed(ClientError):
    """The worker cannot be reached, the connection was lost, or no data arrived in time."""


class ProtocolError(ClientError):
    """The received data is not what a worker sends."""


@dataclass(frozen=True)
class Started:
    """The first event of a job. queue_position: 0 if the job runs at once."""

    job_id: str
    model: str
    started_at: str
    seed: int
    queue_position: int


@dataclass(frozen=True)
class Candidate:
    """One of the most likely tokens at a position. logprob: natural logarithm; None stands for minus infinity."""

    id: int
    token: str
    logprob: float | None


@dataclass(frozen=True)
class Token:
    """A generated token.

    text: may be empty, because text is held back until a code point, or a possible stop string, is complete.
    id, logprob, top: only set if logprobs were requested, and never for a token of a stop string.
    """

    text: str
    index: int
    id: int | None = None
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Metrics:
    """The fields of a `metrics` event."""

    values: dict[str, Any]


@dataclass(frozen=True)
class End:
    """The last event of a job that ended without an error.

    stop_reason: `eos`, `stop` or `length`.
    first_token_ms: milliseconds from the acceptance of the job to its first token, by the worker's clock.
    """

    tokens_out: int
    decode_time_ms: float
    stop_reason: str
    first_token_ms: float | None
    tokens_in: int
    prefix_tokens_reused: int


Event = Started | Token | Metrics | End


@dataclass(frozen=True)
class Piece:
    """A piece of a chat's answer."""

    text: str


@dataclass(frozen=True)
class ChatEnd:
    """The last event of a chat. finish_reason: `stop` or `length`."""

    finish_reason: str
    tokens_in: int
    tokens_out: int
    prefix_tokens_reused: int


ChatEvent = Piece | ChatEnd
E_co = TypeVar("E_co", covariant=True)
T = TypeVar("T")


class Decoder(Protocol[E_co]):
    """Turns the server-sent events of one stream into typed events.

    done: whether the last event has arrived. job_id: the id for /cancel; None until it is known.
    """

    done: bool
    job_id: str | None

    def decode(self, event: ServerSentEvent) -> E_co | None: ...


class ExecuteDecoder:
    """The decoder for POST /execute."""

    def __init__(self, job_id: str) -> None:
        self.job_id: str | None = job_id
        self.done = False
        self._started = False
        self._tokens = 0

    def decode(self, event: ServerSentEvent) -> Event | None:
        """The typed event, or None for an unknown one. Raises WorkerError for `error`, and ProtocolError."""
        name = event.event
        if name not in ("started", "token", "metrics", "end", "error"):
            return None
        data = Fields(name, _object(name, event.data))
        if self.done:
            raise ProtocolError(f"the stream continues after its end: {name}")
        if name == "error":
            self.done = True
            raise WorkerError(data.take("code", str), data.take("message", str), data.take("retriable", bool))
        if self._started == (name == "started"):
            raise ProtocolError(f"{name} arrived {'twice' if self._started else 'before started'}")
        if name == "started":
            return self._start(data)
        if name == "token":
            return self._token(data)
        return self._end(data) if name == "end" else Metrics(data.values)

    def _start(self, data: Fields) -> Started:
        self._started = True
        started = Started(
            data.take("job_id", str),
            data.take("model", str),
            data.take("started_at", str),
            data.take("seed", int),
            data.take("queue_position", int),
        )
        if started.job_id != self.job_id:
            raise ProtocolError(f"started: the stream has job {started.job_id[:SHOWN]!r}, expected {self.job_id!r}")
        return started

    def _token(self, data: Fields) -> Token:
        text, index = data.take("t", str), data.take("i", int)
        if index != self._tokens:
            raise ProtocolError(f"token {index} arrived, expected token {self._tokens}")
        self._tokens += 1
        if "id" not in data.values:
            return Token(text, index)
        top = tuple(_candidate(entry) for entry in data.take("top", list))
        return Token(text, index, data.take("id", int), data.number("logprob", optional=True), top)

    def _end(self, data: Fields) -> End:
        end = End(
            data.take("tokens_out", int),
            data.number("decode_time_ms") or 0.0,
            data.take("stop_reason", str),
            data.number("first_token_ms", optional=True),
            data.take("tokens_in", int),
            data.take("prefix_tokens_reused", int),
        )
        if end.tokens_out != self._tokens:
            raise ProtocolError(f"end: only {self._tokens} of {end.tokens_out} tokens arrived")
        self.done = True
        return end


class ChatDecoder:
    """The decoder for POST /v1/chat/completions with `stream` and `include_usage`, whose events are OpenAI's chunks."""

    def __init__(self) -> None:
        self.job_id: str | None = None
        self.done = False
        self._finish_reason: str | None = None
        self._usage: Fields | None = None

    def decode(self, event: ServerSentEvent) -> ChatEvent | None:
        """A Piece, the ChatEnd, or None for an event without text. Raises WorkerError or ProtocolError."""
        if event.event != "message":
            return None
        if self.done:
            raise ProtocolError("the stream continues after its end")
        if event.data == "[DONE]":
            return self._end()
        value = _object("chunk", event.data)
        if "error" in value:
            self.done = True
            error = Fields("error", value["error"])
            code = error.take("code", str)
            raise WorkerError(code, error.take("message", str), code in RETRIABLE)
        chunk = Fields("chunk", value)
        self.job_id = chunk.take("id", str)
        if chunk.values.get("usage") is not None:
            self._usage = Fields("usage", chunk.values["usage"])
        text = ""
        for choice in chunk.take("choices", list):
            fields = Fields("choice", choice)
            self._finish_reason = fields.values.get("finish_reason") or self._finish_reason
            text += Fields("delta", fields.values.get("delta")).values.get("content") or ""
        return Piece(text) if text else None

    def _end(self) -> ChatEnd:
        if self._finish_reason is None or self._usage is None:
            raise ProtocolError("[DONE] arrived before the finish reason and the usage")
        self.done = True
        usage = self._usage
        details = Fields("usage", usage.values.get("prompt_tokens_details") or {})
        return ChatEnd(
            self._finish_reason,
            usage.take("prompt_tokens", int),
            usage.take("completion_tokens", int),
            details.values.get("cached_tokens", 0),
        )


class Fields:
    """Reads fields of a JSON object and checks their types. Raises ProtocolError. what: begins the errors' messages."""

    def __init__(self, what: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ProtocolError(f"{what}: expected a JSON object, got {_shown(values)}")
        self.values: dict[str, Any] = values
        self._what = what

    def take(self, name: str, kind: type[T]) -> T:
        value = self.values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ProtocolError(f"{self._what}: {name} should be of type {kind.__name__}, got {_shown(value)}")
        return value

    def number(self, name: str, optional: bool = False) -> float | None:
        value = self.values.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ProtocolError(f"{self._what}: {name} should be a number, got {_shown(value)}")
        return float(value)


def fault(status: int, body: bytes, retry_after: str | None) -> ClientError:
    """The error of an HTTP response with a failure status: a WorkerError if its body is a worker's or OpenAI's JSON."""
    try:
        value = json.loads(body)
        fields = Fields("response", value.get("error", value) if isinstance(value, dict) else value)
        code, message = fields.take("code", str), fields.take("message", str)
    except (ValueError, RecursionError, ProtocolError):
        return ProtocolError(f"HTTP status {status} without a worker's error: {_shown(body.decode(errors='replace'))}")
    field = fields.values.get("field", fields.values.get("param"))
    seconds = (
        float(retry_after) if retry_after is not None and retry_after.isascii() and retry_after.isdigit() else None
    )
    return WorkerError(
        code, message, code in RETRIABLE, field if isinstance(field, str) else None, status=status, retry_after=seconds
    )


def _candidate(value: Any) -> Candidate:
    data = Fields("top", value)
    return Candidate(data.take("id", int), data.take("token", str), data.number("logprob", optional=True))


def _object(what: str, text: str) -> dict[str, Any]:
    try:
        return Fields(what, json.loads(text)).values
    except (ValueError, RecursionError):
        raise ProtocolError(f"{what}: the data is not JSON: {_shown(text)}") from None


def _shown(value: Any) -> str:
    text = one_line(value if isinstance(value, str) else json.dumps(value))
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"
