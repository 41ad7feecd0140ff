"""The client with a small socket server in place of a worker: broken streams, codes, retries, deadlines."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from refengine.client.client import AsyncClient, Client
from refengine.client.events import (
    RETRIABLE,
    ClientError,
    ConnectionFailed,
    End,
    Metrics,
    ProtocolError,
    Started,
    Token,
    WorkerError,
)
from refengine.worker import errors as faults


def caught(client: Client, prompt: str = "go on", **options: Any) -> WorkerError:
    with pytest.raises(WorkerError) as error:
        list(client.execute(prompt, **options))
    return error.value


def read_request(connection: socket.socket) -> None:
    """All of it: closing a connection with unread data resets it."""
    seen = b""
    while b"\r\n\r\n" not in seen:
        seen += connection.recv(1 << 16)
    head, _, body = seen.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length is not None and len(body) < int(length[1]):
        body += connection.recv(1 << 16)


@contextmanager
def talking(*parts: bytes | float, times: int = 10) -> Iterator[str]:
    """A server that says these parts to whoever asks, whatever is asked; numbers are seconds of silence."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(times):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=say, args=(connection,), daemon=True).start()

        def say(connection: socket.socket) -> None:
            with connection:
                read_request(connection)
                for part in parts:
                    try:
                        time.sleep(part) if isinstance(part, float) else connection.sendall(part)
                    except OSError:
                        return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def token(i: int, text: str = "x") -> bytes:
    return event("token", {"t": text, "i": i})


STARTED = event("started", {"job_id": "j", "model": "m", "started_at": "now", "seed": 1, "queue_position": 0})
END_DATA: Any = {
    "tokens_out": 1,
    "decode_time_ms": 0.0,
    "stop_reason": "length",
    "first_token_ms": 3.5,
    "tokens_in": 4,
    "prefix_tokens_reused": 0,
}
END = event("end", END_DATA)
REPLY = [STARTED, token(0), END]


def read(url: str, twin: bool, deadline: float | datetime | None = None, **options: Any) -> list[Any]:
    """All events of a job `j`, by one of the two clients."""
    job: Any = {"job_id": "j", "deadline": deadline}
    if not twin:
        with Client(url, **options) as client:
            return list(client.execute("p", **job))

    async def run() -> list[Any]:
        async with AsyncClient(url, **options) as client, client.execute("p", **job) as stream:
            return [e async for e in stream]

    return asyncio.run(run())


both = pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])


@both
def test_a_reply_however_it_is_cut_and_padded(twin: bool) -> None:
    whole = b"".join(
        [
            b": a comment\n\n",
            STARTED,
            b": heartbeat\n\n",
            event("news", {"of": "the future"}),
            b"event: news\ndata: no JSON\n\n",
            b"id: 7\nretry: 10\n" + token(0, "雨"),
            event("metrics", {"tokens_per_s": 3}),
            event("end", {**END_DATA, "new_field": [1]}).replace(b"\n", b"\r\n"),
        ]
    )
    cut = [whole[i : i + 1] for i in range(len(whole))]
    for parts in ([whole], cut):
        with talking(HEAD, *parts) as url:
            events = read(url, twin)
        assert events == [Started("j", "m", "now", 1, 0), Token("雨", 0), Metrics({"tokens_per_s": 3}), End(**END_DATA)]


@both
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "ended without an `end` or `error`"),
        ([STARTED, token(0)], "ended without an `end` or `error`"),
        ([STARTED, token(0), END[:-1]], "ended without an `end` or `error`"),
        ([token(0), END], "token arrived before started"),
        ([END], "end arrived before started"),
        ([STARTED, STARTED], "started arrived twice"),
        ([STARTED.replace(b'"j"', b'"other"')], "has job 'other'"),
        ([STARTED, token(1)], "token 1 arrived, expected token 0"),
        ([STARTED, token(0), token(0)], "token 0 arrived, expected token 1"),
        ([STARTED, END], "only 0 of 1 tokens arrived"),
        ([*REPLY, token(1)], "continues after its end"),
        ([*REPLY, END], "continues after its end"),
        ([STARTED, b"event: token\ndata: {\n\n"], "token: the data is not JSON: '{'"),
        ([STARTED, b"event: token\ndata: " + b"[" * 100_000 + b"\n\n"], "not JSON"),
        ([STARTED, b"event: token\n\n"], "not JSON: ''"),
        ([STARTED, event("token", [1])], "expected a JSON object"),
        ([STARTED, event("token", {"t": 1, "i": 0})], "t should be of type str, got '1'"),
        ([STARTED, event("token", {"t": "x", "i": True})], "i should be of type int"),
        ([STARTED, event("token", {"t": "x"})], "i should be of type int, got 'null'"),
        ([STARTED, event("token", {"t": "x", "i": 0, "id": 1, "top": [3]})], "top: expected a JSON object"),
        ([STARTED, token(0), event("end", {**END_DATA, "decode_time_ms": "1"})], "should be a number"),
        ([STARTED, event("error", {"code": "X"})], "message should be of type str"),
        ([STARTED, event("started\x1b[31m", {}), event("token", {"t": "\x1b[31m"})], "i should be"),
    ],
)
def test_broken_streams(parts: list[bytes], message: str, twin: bool) -> None:
    with talking(HEAD, *parts) as url, pytest.raises(ProtocolError) as error:
        read(url, twin)
    assert message in str(error.value)
    assert str(error.value).isprintable()


@both
@pytest.mark.parametrize("code", faults.STATUS)
def test_every_code(code: str, twin: bool) -> None:
    fault = faults.WorkerError(code, "words", "prompt")
    with (
        talking(HEAD, STARTED, token(0), event("error", fault.event())) as url,
        pytest.raises(WorkerError) as in_stream,
    ):
        read(url, twin)
    body = json.dumps(fault.body()).encode()
    head = f"HTTP/1.1 {fault.status} X\r\nContent-Length: {len(body)}\r\n".encode()
    extra = "".join(f"{k}: {v}\r\n" for k, v in fault.headers().items()).encode()
    with talking(head + extra + b"\r\n" + body) as url, pytest.raises(WorkerError) as at_once:
        read(url, twin)
    for error, status in ((in_stream.value, None), (at_once.value, fault.status)):
        assert (error.code, error.message, error.status) == (code, "words", status)
        assert error.retriable == (code in faults.RETRIABLE)
    assert at_once.value.field == "prompt"
    assert (at_once.value.retry_after is not None) == bool(fault.headers())


def test_the_client_knows_what_is_retriable() -> None:
    assert RETRIABLE == faults.RETRIABLE


@both
@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops"], ProtocolError, "HTTP status 502"),
        ([b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"], ProtocolError, "HTTP status 302"),
        ([b'HTTP/1.1 500 X\r\nContent-Length: 12\r\n\r\n{"error": 1}'], ProtocolError, "HTTP status 500"),
        ([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi"], ProtocolError, "event-stream"),
        ([b"nonsense\r\n\r\n"], ConnectionFailed, "connection was lost"),
        ([], ConnectionFailed, "connection was lost"),
        ([60.0], ConnectionFailed, "sent nothing for 2 s"),
        ([HEAD, STARTED, 60.0], ConnectionFailed, "sent nothing for 2 s"),
        ([HEAD.replace(b"Connection: close", b"Content-Length: 9999"), STARTED], ConnectionFailed, "lost"),
    ],
)
def test_broken_connections(parts: list[Any], kind: type[ClientError], message: str, twin: bool) -> None:
    with talking(*parts) as url, pytest.raises(kind, match=message):
        read(url, twin, timeout=2)  # enough for a busy machine to connect


@both
def test_comments_keep_a_waiting_stream_alive(twin: bool) -> None:
    beats: list[Any] = [part for _ in range(8) for part in (0.3, b": waiting\n\n")]
    with talking(HEAD, STARTED, *beats, token(0), END) as url:
        assert len(read(url, twin, timeout=2)) == 3  # 2.4 s in all


@both
def test_a_connection_that_breaks_after_the_end_is_no_error(twin: bool) -> None:
    with talking(HEAD.replace(b"Connection: close", b"Content-Length: 9999"), *REPLY) as url:
        assert len(read(url, twin)) == 3


BUSY = b'HTTP/1.1 503 X\r\n%sContent-Length: 38\r\nConnection: close\r\n\r\n{"code": "QUEUE_FULL", "message": "m"}'


@pytest.mark.parametrize(
    "retry_after", [b"", b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n", b"Retry-After: -1\r\n"]
)
def test_no_retry_unless_the_worker_says_when(retry_after: bytes) -> None:
    with talking(BUSY % retry_after) as url, Client(url, retries=3) as client:
        assert caught(client).code == "QUEUE_FULL"


@both
def test_retries_are_bounded(twin: bool) -> None:
    with (
        talking(BUSY % b"Retry-After: 0\r\n", times=3) as url,
        pytest.raises(WorkerError, match="QUEUE_FULL"),
    ):
        read(url, twin, retries=2)


@contextmanager
def refusing(retry_after: int) -> Iterator[tuple[str, list[str]]]:
    """A server that has no room for anybody, and the deadlines that it was told."""
    told: list[str] = []

    class Full(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            told.append(self.headers["x-deadline"])
            self.wfile.write(BUSY % f"Retry-After: {retry_after}\r\n".encode())
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Full) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", told
        server.shutdown()


@both
@pytest.mark.parametrize("as_time", [False, True], ids=["seconds", "moment"])
def test_a_deadline_counts_from_the_first_request(twin: bool, as_time: bool) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=60)
    with refusing(1) as (url, told), pytest.raises(WorkerError, match="QUEUE_FULL"):
        read(url, twin, deadline=moment if as_time else 60, retries=2)
    if as_time:
        assert told == [moment.isoformat()] * 3
    else:
        first, second, third = map(float, told)
        assert 60 >= first >= second + 1 >= third + 2  # less by the pauses, which are a second and more


@both
@pytest.mark.parametrize("as_time", [False, True], ids=["seconds", "moment"])
def test_a_client_does_not_wait_past_its_deadline(twin: bool, as_time: bool) -> None:
    with refusing(30) as (url, told):
        start = time.monotonic()
        with pytest.raises(WorkerError, match="QUEUE_FULL") as error:
            read(url, twin, deadline=datetime.now(UTC) + timedelta(seconds=25) if as_time else 25, retries=9)
        assert time.monotonic() - start < 20  # at once, on a busy machine; the pause alone would be 30 s
    assert (error.value.code, error.value.retriable, error.value.status) == ("INFERENCE_TIMEOUT", True, 503)
    assert len(told) == 1


CHUNK: Any = {"id": "c", "choices": [{"delta": {"content": "x"}, "finish_reason": None}]}


@pytest.mark.parametrize(
    ("chunks", "kind", "message"),
    [
        ([CHUNK], ProtocolError, "ended without an `end` or `error`"),
        ([CHUNK, "[DONE]"], ProtocolError, "before the finish reason"),
        ([{"error": {"code": "CANCELLED", "message": "m"}}, "[DONE]"], WorkerError, "CANCELLED: m"),
        ([{"error": "m"}], ProtocolError, "expected a JSON object"),
        ([{"id": "c"}], ProtocolError, "choices should be of type list"),
    ],
)
def test_broken_chats(chunks: list[Any], kind: type[ClientError], message: str) -> None:
    sent = [f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n".encode() for c in chunks]
    with talking(HEAD, *sent) as url, Client(url) as client, pytest.raises(kind, match=message):
        list(client.chat([{"role": "user", "content": "x"}]))


@pytest.mark.parametrize("body", [b"no JSON", b"[1]", b'{"tokens": 1}', b'{"tokens": ' + b"[" * 100_000])
def test_broken_answers(body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with talking(answer) as url, Client(url) as client, pytest.raises(ProtocolError):
        client.tokenize("x")
