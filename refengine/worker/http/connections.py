"""Limits on HTTP connections that uvicorn's h11 protocol does not have.

They limit the number of connections, the size of a request's head, and the time that a client takes to send the head,
to read the response and to close the connection. `app.read_body` limits a body's size and time, `stream.EventStream`
the time to read a stream.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from refengine.worker.errors import WorkerError
from refengine.worker.http.app import OPEN_PATHS, answer

HEAD_TIMEOUT_S = 10.0  # from the start of the connection, or the end of the last response, to a complete head
RESERVED_HEAD_TIMEOUT_S = 2.0  # the same on a reserved connection
BODY_REST_TIMEOUT_S = 5.0  # for the rest of a body that was answered before its end
WRITE_TIMEOUT_S = 30.0  # without any progress, for a client to read what was sent
LINGER_S = 1.0  # for a refused client to read the response before the connection is closed
CHECK_S = 1.0  # between two checks of all connections
RESERVED = 16  # additional connections beyond the limit, only for /health
MAX_HEAD_BYTES = 16 << 10
MAX_TARGET_BYTES = 4 << 10
MAX_HEADERS = 100
MAX_AHEAD_BYTES = 64 << 10  # of pipelined requests, sent before the current one is answered
SEND_BUFFER_BYTES = 128 << 10  # in the kernel; with its default size, a client that does not read occupies megabytes

FULL = WorkerError("QUEUE_FULL", "all connections of this worker are in use: try again later")


class Http(h11.Connection):
    """Refuses heads that are too large, and requests whose length is ambiguous (request smuggling)."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            _check_head(event)
        return event


def _check_head(head: h11.Request) -> None:
    names = [name for name, _ in head.headers]
    n_bytes = len(head.target) + sum(len(name) + len(value) + 4 for name, value in head.headers)
    if len(head.target) > MAX_TARGET_BYTES:
        raise h11.RemoteProtocolError(f"a request line of more than {MAX_TARGET_BYTES} bytes", 414)
    if len(names) > MAX_HEADERS or n_bytes > MAX_HEAD_BYTES:
        raise h11.RemoteProtocolError(f"more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes of them", 431)
    if head.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are supported", 505)
    if b"transfer-encoding" in names and (b"content-length" in names or head.http_version == b"1.0"):
        raise h11.RemoteProtocolError("the body's length is ambiguous (Transfer-Encoding)", 400)


class Connection(H11Protocol):
    """One client's connection. Servers use the subclass that `limited` makes."""

    max_connections = sys.maxsize

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn = Http(h11.SERVER, MAX_HEAD_BYTES)
        self._head_timeout_s = HEAD_TIMEOUT_S
        self._refused = False
        self._n_ahead = 0  # bytes
        self._seen: tuple[Any, ...] = ()
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        with_socket = transport.get_extra_info("socket")
        if with_socket is not None:
            with_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.check(time.monotonic())
        n_over = len(self.connections) - self.max_connections
        if n_over > 0:
            self.logger.warning("All connections of this worker are in use.")
        if n_over > RESERVED:
            self._refuse(FULL)
        elif n_over > 0:
            self.app, self._head_timeout_s = Reserved(self.app), RESERVED_HEAD_TIMEOUT_S

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.DONE:
            self._n_ahead += len(data)
            if self._n_ahead > MAX_AHEAD_BYTES:
                self.transport.abort()
                return
        super().data_received(data)
        if self.conn.their_state is h11.DONE:
            self.flow.resume_reading()  # without reading, a disconnect would not be noticed

    def _should_upgrade(self) -> bool:
        return False  # no upgrade is supported; uvicorn would log a warning for each request

    def on_response_complete(self) -> None:
        self._n_ahead = 0
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer an invalid request. Called in an `except` block, whose exception has the reason."""
        error = sys.exc_info()[1]
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the body is invalid
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response has begun
            self.transport.abort()
            return
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(WorkerError("INVALID_REQUEST", f"this is not a valid HTTP request: {error or msg}", status=status))

    def _refuse(self, fault: WorkerError) -> None:
        """Send an error without calling the app, and close the connection LINGER_S later.

        The delay lets the client read the error; closing with unread data at once would reset the connection.
        """
        self._refused = True
        self._unset_keepalive_if_required()
        body = json.dumps(fault.body()).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **fault.headers(),
        }
        lines = [f"HTTP/1.1 {fault.status} {fault.code}", *(f"{name}: {value}" for name, value in headers.items())]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def check(self, now: float) -> None:
        """Close the connection if its client has made no progress for too long. Called every CHECK_S seconds."""
        phase, timeout_s = self._phase()
        seen = (phase, self.cycle, self.transport.get_write_buffer_size())
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since > timeout_s:
            if phase == "head" and self.conn.trailing_data[0]:
                message = f"no complete request arrived within {timeout_s:g} s"
                self._refuse(WorkerError("INVALID_REQUEST", message, status=408))
            else:
                self.transport.abort()

    def _phase(self) -> tuple[str, float]:
        """What the connection is waiting for, and the maximum time for that in seconds."""
        if self._refused or self.transport.is_closing():
            return "closing", WRITE_TIMEOUT_S
        if self.cycle is not None and not self.cycle.response_complete:
            return "answer", WRITE_TIMEOUT_S if self.transport.get_write_buffer_size() else float("inf")
        if self.conn.their_state is h11.IDLE:
            return "head", self._head_timeout_s
        return "body", BODY_REST_TIMEOUT_S

    def shutdown(self) -> None:
        if self._refused:
            self.transport.abort()
        else:
            super().shutdown()


def limited(max_connections: int) -> type[Connection]:
    """The protocol class for a server with at most this many connections, plus RESERVED ones for /health only."""
    return type("LimitedConnection", (Connection,), {"max_connections": max_connections})


class Reserved:
    """The app on a reserved connection: it answers one request, and only for a path in OPEN_PATHS."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        app = self._app if scope["path"] in OPEN_PATHS else answer(FULL, scope["path"])
        await app(scope, receive, closing)
