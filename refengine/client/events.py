"""What a worker's streams say, as typed events; and the errors of a client. Nothing here knows of connections.

A decoder takes the server-sent events of one stream in turn, and raises ProtocolError where a stream breaks the rules:
`started` first, tokens counted without a gap, one last event. Unknown events, and unknown fields, are passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from httpx_sse import ServerSentEvent

from refengine.errors import RefengineError, one_line

RETRIABLE = {"VRAM_OOM", "CUDA_ERROR", "INFERENCE_TIMEOUT", "QUEUE_FULL", "SHUTTING_DOWN"}  # HTTP answers do not say
SHOWN = 80  # characters of something malformed that an error quotes


class ClientError(RefengineError):
    """Base of what a client raises."""


class WorkerError(ClientError):
    """The worker refused a request, or ended it. status: None where the stream had begun.

    retry_after: seconds after which the worker wants to be asked again.
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
    """The worker cannot be reached, the connection was lost, or nothing came in time."""


class ProtocolError(ClientError):
    """What came is not what a worker sends."""


@dataclass(frozen=True)
class Started:
    job_id: str
    model: str
    started_at: str
    seed: int
    queue_position: int


@dataclass(frozen=True)
class Candidate:
    """A token that was likely. logprob: natural logarithm; None is minus infinity."""

    id: int
    token: str
    logprob: float | None


@dataclass(frozen=True)
class Token:
    """text may be empty: it is held back until a code point, or a possible stop string, is complete.

    id, logprob, top: only where logprobs were asked for, and never for a token of a stop string.
    """

    text: str
    index: int
    id: int | None = None
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Metrics:
    values: dict[str, Any]


@dataclass(frozen=True)
class End:
    """stop_reason: `eos`, `stop` or `length`. first_token_ms: from accept, by the worker's clock."""

    tokens_out: int
    decode_time_ms: float
    stop_reason: str
    first_token_ms: float | None
    tokens_in: int
    prefix_tokens_reused: int


Event = Started | Token | Metrics | End


@dataclass(frozen=True)
class Piece:
    """Text of a chat's answer."""

    text: str


@dataclass(frozen=True)
class ChatEnd:
    """finish_reason: `stop` or `length`."""

    finish_reason: str
    tokens_in: int
    tokens_out: int
    prefix_tokens_reused: int


ChatEvent = Piece | ChatEnd
E_co = TypeVar("E_co", covariant=True)
T = TypeVar("T")


class Decoder(Protocol[E_co]):
    """done: the last event has come. job_id: what /cancel takes; None until it is known."""

    done: bool
    job_id: str | None

    def decode(self, event: ServerSentEvent) -> E_co | None: ...


class ExecuteDecoder:
    """Of POST /execute."""

    def __init__(self, job_id: str) -> None:
        self.job_id: str | None = job_id
        self.done = False
        self._started = False
        self._tokens = 0

    def decode(self, event: ServerSentEvent) -> Event | None:
        """The event, or None for one that is unknown. Raises WorkerError for `error`, ProtocolError."""
        name = event.event
        if name not in ("started", "token", "metrics", "end", "error"):
            return None
        data = Fields(name, _object(name, event.data))
        if self.done:
            raise ProtocolError(f"the stream goes on after its end: {name}")
        if name == "error":
            self.done = True
            raise WorkerError(data.take("code", str), data.take("message", str), data.take("retriable", bool))
        if self._started == (name == "started"):
            raise ProtocolError(f"{name} came {'twice' if self._started else 'before started'}")
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
            raise ProtocolError(f"started: the stream is of job {started.job_id[:SHOWN]!r}, not of {self.job_id!r}")
        return started

    def _token(self, data: Fields) -> Token:
        text, index = data.take("t", str), data.take("i", int)
        if index != self._tokens:
            raise ProtocolError(f"token {index} came where {self._tokens} was due")
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
            raise ProtocolError(f"end: of {end.tokens_out} tokens {self._tokens} came")
        self.done = True
        return end


class ChatDecoder:
    """Of POST /v1/chat/completions with `stream` and its usage: OpenAI's chunks."""

    def __init__(self) -> None:
        self.job_id: str | None = None
        self.done = False
        self._finish_reason: str | None = None
        self._usage: Fields | None = None

    def decode(self, event: ServerSentEvent) -> ChatEvent | None:
        """A piece of text, or the end. Raises WorkerError, ProtocolError."""
        if event.event != "message":
            return None
        if self.done:
            raise ProtocolError("the stream goes on after its end")
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
            raise ProtocolError("[DONE] came before the reason and the usage")
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
    """The fields of a JSON object, taken with the type that they must have. Raises ProtocolError."""

    def __init__(self, what: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ProtocolError(f"{what}: expected a JSON object, came {_shown(values)}")
        self.values: dict[str, Any] = values
        self._what = what

    def take(self, name: str, kind: type[T]) -> T:
        value = self.values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ProtocolError(f"{self._what}: {name} should be of type {kind.__name__}, came {_shown(value)}")
        return value

    def number(self, name: str, optional: bool = False) -> float | None:
        value = self.values.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ProtocolError(f"{self._what}: {name} should be a number, came {_shown(value)}")
        return float(value)


def fault(status: int, body: bytes, retry_after: str | None) -> ClientError:
    """An HTTP answer that is no success: the worker's own JSON, or OpenAI's, or somebody else's."""
    try:
        value = json.loads(body)
        fields = Fields("answer", value.get("error", value) if isinstance(value, dict) else value)
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
        raise ProtocolError(f"{what}: the data is no JSON: {_shown(text)}") from None


def _shown(value: Any) -> str:
    text = one_line(value if isinstance(value, str) else json.dumps(value))
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…"
