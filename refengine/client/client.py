"""A client of the worker.

    with Client("http://127.0.0.1:8080") as client:
        for event in client.execute("Write a haiku about the sea", max_tokens=50, seed=42):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)

`execute` yields Started, a Token for each token, Metrics if the worker sends them, and End. Every error is a
ClientError: a WorkerError with the worker's code, ConnectionFailed, or ProtocolError. Leaving the loop closes the
connection, and the worker stops the job. AsyncClient is the same for asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import httpx
from httpx_sse import EventSource, SSEError

from refengine.client.events import (
    RETRIABLE,
    Candidate,
    ChatDecoder,
    ChatEnd,
    ChatEvent,
    ClientError,
    ConnectionFailed,
    Decoder,
    End,
    Event,
    ExecuteDecoder,
    Fields,
    Metrics,
    Piece,
    ProtocolError,
    Started,
    Token,
    WorkerError,
    fault,
)
from refengine.errors import RequestError, one_line

__all__ = [
    "AsyncClient",
    "Candidate",
    "ChatEnd",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "End",
    "Generated",
    "Metrics",
    "Piece",
    "ProtocolError",
    "Sampling",
    "Started",
    "Token",
    "WorkerError",
]

DEFAULT_URL = "http://127.0.0.1:8080"
READ_TIMEOUT_S = 60.0  # a working stream is never silent for so long: the worker sends comments while a request waits
CONNECT_TIMEOUT_S = 5.0
MAX_PAUSE_S = 30.0  # the longest pause before a retry, even if the worker asks for more
LATE = "INFERENCE_TIMEOUT"

Body = Mapping[str, Any]
E = TypeVar("E")


class Sampling(TypedDict, total=False):
    """Sampling parameters. Those that are left out get the worker's defaults; the worker checks all of them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: Sequence[str]
    seed: int
    logprobs: int


@dataclass(frozen=True)
class Generated:
    """The result of `Client.generate`: the whole text, and the first and last events."""

    text: str
    started: Started
    end: End


class Stream(Generic[E]):
    """The events of a request. Asking for the first event sends the request; closing or deleting it stops the job."""

    def __init__(self, events: Generator[E, None, None], decoder: Decoder[E]) -> None:
        self._events, self._decoder = events, decoder

    @property
    def job_id(self) -> str | None:
        return self._decoder.job_id

    def __iter__(self) -> Iterator[E]:
        return self

    def __next__(self) -> E:
        return next(self._events)

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> Stream[E]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Base:
    """The common part of both clients: the worker's address, headers, retries, and the conversion of errors."""

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int) -> None:
        if retries < 0 or not timeout > 0:
            raise RequestError(
                f"timeout: given {timeout}, allowed above 0; retries: given {retries}, allowed 0 or more"
            )
        self.url, self._retries, self._timeout = _checked_url(url), retries, timeout
        headers = {"User-Agent": "refengine"}
        if api_key is not None:
            if re.fullmatch(r"[!-~]+", api_key) is None:
                raise RequestError(f"api_key: given {len(api_key)} characters, allowed printable ASCII without spaces")
            headers["Authorization"] = f"Bearer {api_key}"
        # No proxies and no .netrc: the client connects directly to the worker and sends only this key.
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": headers,
            "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S)),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
            "trust_env": False,
        }

    def _pause(self, error: ClientError, attempt: int, left: float) -> float:
        """The seconds to wait before a retry. Raises the error if there is no retry. left: seconds to the deadline."""
        if not isinstance(error, WorkerError) or error.retry_after is None or attempt >= self._retries:
            raise error
        pause = min(error.retry_after, MAX_PAUSE_S) * random.uniform(1.0, 1.25)  # spreads the retries of many clients
        if pause >= left:
            message = f"the deadline passes before a retry is allowed, in {pause:.1f} s ({error})"
            raise WorkerError(LATE, message, LATE in RETRIABLE, status=error.status, retry_after=error.retry_after)
        return pause

    def _failure(self, error: httpx.HTTPError) -> ClientError:
        if isinstance(error, SSEError):
            return ProtocolError(f"{self.url}: {one_line(str(error))}")
        if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
            return ConnectionFailed(f"{self.url} cannot be reached: {one_line(str(error)) or type(error).__name__}")
        if isinstance(error, httpx.TimeoutException):
            return ConnectionFailed(f"{self.url} sent nothing for {self._timeout:g} s")
        return ConnectionFailed(f"{self.url}: the connection was lost: {one_line(str(error)) or type(error).__name__}")

    @staticmethod
    def _ended(decoder: Decoder[Any]) -> None:
        if not decoder.done:
            raise ProtocolError("the stream ended without an `end` or `error` event")

    @staticmethod
    def _fault(response: httpx.Response) -> ClientError:
        return fault(response.status_code, response.content, response.headers.get("retry-after"))

    @classmethod
    def _checked(cls, response: httpx.Response, *also: int) -> httpx.Response:
        if not response.is_success and response.status_code not in also:
            raise cls._fault(response)
        return response

    @staticmethod
    def _json(response: httpx.Response) -> Fields:
        try:
            return Fields("answer", json.loads(response.content))
        except (ValueError, RecursionError):
            raise ProtocolError("the response is not JSON") from None


class Client(_Base):
    """A client of one worker.

    timeout: the maximum seconds without any data from the worker.
    retries: how often a request is sent again if the worker answers 503 with Retry-After before its stream starts.
    """

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, timeout: float = READ_TIMEOUT_S, retries: int = 0
    ) -> None:
        super().__init__(url, api_key, timeout, retries)
        self._http = httpx.Client(**self._options)

    def execute(
        self,
        prompt: str,
        *,
        job_id: str | None = None,
        deadline: float | datetime | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream[Event]:
        """Generate from a prompt; returns the stream of events. Iterating raises ClientError.

        deadline: when the worker ends the request with an error, as a datetime with its time zone, or as seconds from
        the first request for an event; retries are included in that time.
        """
        job_id = uuid.uuid4().hex if job_id is None else job_id
        decoder = ExecuteDecoder(job_id)
        return Stream(
            self._stream("/execute", {"job_id": job_id, "prompt": prompt, **sampling}, deadline, decoder), decoder
        )

    def generate(
        self, prompt: str, *, deadline: float | datetime | None = None, **sampling: Unpack[Sampling]
    ) -> Generated:
        """Generate from a prompt and wait for the whole text. Raises ClientError."""
        events = list(self.execute(prompt, deadline=deadline, **sampling))
        started, end = events[0], events[-1]
        assert isinstance(started, Started)
        assert isinstance(end, End)
        return Generated("".join(event.text for event in events if isinstance(event, Token)), started, end)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        deadline: float | datetime | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream[ChatEvent]:
        """Answer a conversation, using the model's chat template. `logprobs` is not supported.

        Returns a stream of Pieces of text and a final ChatEnd. Iterating raises ClientError.
        """
        body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **sampling}
        decoder = ChatDecoder()
        return Stream(self._stream("/v1/chat/completions", body, deadline, decoder), decoder)

    def cancel(self, job_id: str) -> None:
        """Cancel a job; its stream ends with WorkerError CANCELLED. Does nothing for a job that has ended."""
        self._call("POST", "/cancel", {"job_id": job_id})

    def health(self) -> dict[str, Any]:
        return self._json(self._call("GET", "/health", None, 503)).values

    def metrics(self) -> str:
        """The worker's metrics in Prometheus' text format."""
        return self._call("GET", "/metrics").text

    def shutdown(self) -> None:
        self._call("POST", "/shutdown")

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._json(self._call("POST", "/tokenize", body)).take("tokens", list)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._json(self._call("POST", "/detokenize", {"tokens": list(tokens)})).take("content", str)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Body | None = None, *also: int) -> httpx.Response:
        try:
            return self._checked(self._http.request(method, path, **_content(body)), *also)
        except httpx.HTTPError as e:
            raise self._failure(e) from None

    def _stream(
        self, path: str, body: Body, deadline: float | datetime | None, decoder: Decoder[E]
    ) -> Generator[E, None, None]:
        end = _Deadline(deadline)
        attempt = 0
        while True:
            try:
                with self._http.stream("POST", path, **_content(body, end)) as response:
                    if response.status_code == 200:
                        for event in EventSource(response).iter_sse():
                            decoded = decoder.decode(event)
                            if decoded is not None:
                                yield decoded
                        self._ended(decoder)
                        return
                    response.read()
            except httpx.HTTPError as e:
                if decoder.done:  # all events have been read
                    return
                raise self._failure(e) from None
            time.sleep(self._pause(self._fault(response), attempt, end.left()))
            attempt += 1


class AsyncStream(Generic[E]):
    """Like Stream, for asyncio. Use `async with` or `aclose`: a stream that is only deleted may close much later."""

    def __init__(self, events: AsyncGenerator[E, None], decoder: Decoder[E]) -> None:
        self._events, self._decoder = events, decoder

    @property
    def job_id(self) -> str | None:
        return self._decoder.job_id

    def __aiter__(self) -> AsyncIterator[E]:
        return self

    async def __anext__(self) -> E:
        return await anext(self._events)

    async def aclose(self) -> None:
        await self._events.aclose()

    async def __aenter__(self) -> AsyncStream[E]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient(_Base):
    """Like Client, for asyncio. It has execute, cancel, health and metrics."""

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, timeout: float = READ_TIMEOUT_S, retries: int = 0
    ) -> None:
        super().__init__(url, api_key, timeout, retries)
        self._http = httpx.AsyncClient(**self._options)

    def execute(
        self,
        prompt: str,
        *,
        job_id: str | None = None,
        deadline: float | datetime | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream[Event]:
        """See Client.execute."""
        job_id = uuid.uuid4().hex if job_id is None else job_id
        decoder = ExecuteDecoder(job_id)
        return AsyncStream(
            self._stream("/execute", {"job_id": job_id, "prompt": prompt, **sampling}, deadline, decoder), decoder
        )

    async def cancel(self, job_id: str) -> None:
        await self._call("POST", "/cancel", {"job_id": job_id})

    async def health(self) -> dict[str, Any]:
        return self._json(await self._call("GET", "/health", None, 503)).values

    async def metrics(self) -> str:
        return (await self._call("GET", "/metrics")).text

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _call(self, method: str, path: str, body: Body | None = None, *also: int) -> httpx.Response:
        try:
            return self._checked(await self._http.request(method, path, **_content(body)), *also)
        except httpx.HTTPError as e:
            raise self._failure(e) from None

    async def _stream(
        self, path: str, body: Body, deadline: float | datetime | None, decoder: Decoder[E]
    ) -> AsyncGenerator[E, None]:
        end = _Deadline(deadline)
        attempt = 0
        while True:
            try:
                async with self._http.stream("POST", path, **_content(body, end)) as response:
                    if response.status_code == 200:
                        async with contextlib.aclosing(EventSource(response).aiter_sse()) as events:
                            async for event in events:
                                decoded = decoder.decode(event)
                                if decoded is not None:
                                    yield decoded
                        self._ended(decoder)
                        return
                    await response.aread()
            except httpx.HTTPError as e:
                if decoder.done:
                    return
                raise self._failure(e) from None
            await asyncio.sleep(self._pause(self._fault(response), attempt, end.left()))
            attempt += 1


class _Deadline:
    """A deadline. Seconds count from the construction. Raises RequestError for a datetime without a time zone."""

    def __init__(self, given: float | datetime | None) -> None:
        if isinstance(given, datetime) and given.tzinfo is None:
            raise RequestError(f"deadline: given {given}, which has no time zone")
        self._given, self._start = given, time.monotonic()

    def left(self) -> float:
        """The seconds left; infinite without a deadline."""
        if isinstance(self._given, datetime):
            return (self._given - datetime.now(UTC)).total_seconds()
        return math.inf if self._given is None else self._given - (time.monotonic() - self._start)

    def headers(self) -> dict[str, str]:
        if self._given is None:
            return {}
        return {"X-Deadline": self._given.isoformat() if isinstance(self._given, datetime) else repr(self.left())}


def _content(body: Body | None, deadline: _Deadline | None = None) -> dict[str, Any]:
    """The JSON body and the headers of a request, as arguments for httpx. Raises RequestError if it cannot be JSON."""
    if body is None:
        return {}
    try:
        content = json.dumps(body, allow_nan=False).encode()
    except (ValueError, TypeError) as e:
        raise RequestError(f"the request cannot be sent as JSON: {e}") from None
    headers = {"Content-Type": "application/json"}
    if deadline is not None:
        headers |= deadline.headers()
    return {"content": content, "headers": headers}


def _checked_url(text: str) -> str:
    try:
        url = httpx.URL(text)
        well_formed = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, TypeError):
        well_formed = False
    if not well_formed:
        raise RequestError(f"url: given {text!r:.100}, allowed http://HOST:PORT or https://HOST")
    return text.rstrip("/")
