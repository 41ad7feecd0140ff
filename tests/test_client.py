"""The client and `refengine ask`: every event and code, of a real worker; broken streams, of a small socket server."""

import asyncio
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from refengine.client import AsyncClient, ChatEnd, Client, Piece
from refengine.client_events import (
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
from refengine.errors import RequestError
from refengine.worker import faults
from tests.cli_runner import ENVIRONMENT, ROOT, cli, subprocess_cli
from tests.worker_server import FAULTY, HAIKU, Server, free_port, serving, text_of, until, write_talker

PROMPT = HAIKU["prompt"]
SAMPLING: Any = {k: v for k, v in HAIKU.items() if k != "prompt"}
LONG: Any = {"seed": 5, "temperature": 1.0}
KEY = "a-key-of-sorts"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flag") / "fail"


@pytest.fixture(scope="module")
def busy(talker: Path, flag: Path) -> Iterator[Server]:
    """One request runs, none waits."""
    with serving("--model", talker, "--max-batch", 1, "--max-queue", 0, script=(FAULTY, flag)) as running:
        yield running


def caught(client: Client, prompt: str = "go on", **options: Any) -> WorkerError:
    with pytest.raises(WorkerError) as error:
        list(client.execute(prompt, **options))
    return error.value


# ---- a real worker ---------------------------------------------------------------------------------------------------


def test_events_are_typed(server: Server) -> None:
    with Client(server.url, KEY) as client:
        events = list(client.execute(PROMPT, job_id="typed", logprobs=2, **SAMPLING))
        plain = client.generate(PROMPT, **SAMPLING)
    started, *tokens, end = events
    assert isinstance(started, Started)
    assert (started.job_id, started.seed, started.queue_position) == ("typed", 42, 0)
    assert started.model == "refengine haiku"
    assert [t.index for t in tokens if isinstance(t, Token)] == list(range(len(tokens)))
    assert all(isinstance(t, Token) and t.id is not None and len(t.top) == 2 for t in tokens)
    assert isinstance(end, End)
    assert (end.tokens_out, end.stop_reason, end.tokens_in) == (len(tokens), "eos", 6)
    assert plain.text == "".join(t.text for t in tokens if isinstance(t, Token))
    assert plain.end.tokens_out == end.tokens_out


def test_the_async_client_gives_the_same(server: Server) -> None:
    async def both() -> list[Any]:
        async with AsyncClient(server.url, KEY) as client:
            assert (await client.health())["status"] == "healthy"
            assert "worker_kv_blocks" in await client.metrics()
            await client.cancel("nobody")
            async with client.execute(PROMPT, job_id="same", **SAMPLING) as stream:
                return [event async for event in stream]

    events = asyncio.run(both())
    with Client(server.url, KEY) as client:
        again = list(client.execute(PROMPT, job_id="same", **SAMPLING))
    assert [e for e in events if isinstance(e, Token)] == [e for e in again if isinstance(e, Token)]
    assert [type(e) for e in events] == [type(e) for e in again]


def test_the_other_routes(server: Server) -> None:
    with Client(server.url + "/", KEY) as client:
        assert client.health()["model"] == "refengine haiku"
        assert "worker_kv_blocks" in client.metrics()
        ids = client.tokenize("the sea")
        assert ids
        assert client.detokenize(ids) == "the sea"
        client.cancel("nobody")


def test_chat(server: Server) -> None:
    with Client(server.url, KEY) as client:
        *pieces, end = client.chat([{"role": "user", "content": PROMPT}], **SAMPLING)
    assert isinstance(end, ChatEnd)
    assert (end.finish_reason, end.tokens_in) == ("stop", 14)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    assert len(text.strip().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "code", "field", "status"),
    [
        ({"temperature": 3}, "INVALID_REQUEST", "temperature", 400),
        ({"prompt": ""}, "INVALID_REQUEST", "prompt", 400),
        ({"prompt": "x" * (1 << 20)}, "INVALID_REQUEST", None, 413),
        ({"deadline": -1.0}, "INFERENCE_TIMEOUT", "X-Deadline", 504),
        ({"deadline": datetime.now(UTC) - timedelta(days=1)}, "INFERENCE_TIMEOUT", "X-Deadline", 504),
        ({"seed": -1}, "INVALID_REQUEST", "seed", 400),
    ],
)
def test_refusals(server: Server, options: Any, code: str, field: str | None, status: int) -> None:
    with Client(server.url, KEY) as client:
        error = caught(client, **{"prompt": "x", **options})
    assert (error.code, error.field, error.status) == (code, field, status)
    assert str(error).startswith(f"{code}: ")


def test_wrong_key(server: Server) -> None:
    for key in (None, "not-the-key"):
        with Client(server.url, key) as client:
            assert caught(client).status == 401
            with pytest.raises(WorkerError, match="UNAUTHORIZED"):
                client.metrics()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_sent(server: Server, number: float) -> None:
    with Client(server.url, KEY) as client, pytest.raises(RequestError, match="cannot be sent as JSON"):
        list(client.execute("x", temperature=number))


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "ftp://x"},
        {"url": "http://"},
        {"url": "127.0.0.1:80"},
        {"url": "http://x:port"},
        {"api_key": "two\nlines"},
        {"timeout": 0},
        {"retries": -1},
    ],
)
def test_unusable_arguments(arguments: Any) -> None:
    with pytest.raises(RequestError, match="given"):
        Client(**arguments)


def test_a_deadline_without_zone_is_refused(server: Server) -> None:
    with Client(server.url) as client, pytest.raises(RequestError, match="no zone"):
        list(client.execute("x", deadline=datetime.now()))


def test_cancel_and_deadline_end_a_stream(busy: Server) -> None:
    with Client(busy.url) as client, Client(busy.url) as other:
        stream = client.execute("go on", **LONG)
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), Token)
        assert stream.job_id is not None
        other.cancel(stream.job_id)
        with pytest.raises(WorkerError, match="CANCELLED") as error:
            list(stream)
        assert (error.value.code, error.value.retriable, error.value.status) == ("CANCELLED", False, None)
        busy.settled()
        late = caught(client, deadline=0.3, **LONG)
        assert (late.code, late.retriable, late.status) == ("INFERENCE_TIMEOUT", True, None)


@pytest.mark.parametrize(("kind", "code"), [("memory", "VRAM_OOM"), ("bug", "INTERNAL")])
def test_failures_of_the_worker(busy: Server, flag: Path, kind: str, code: str) -> None:
    busy.settled()
    with Client(busy.url) as client:
        stream = client.execute("go on", **LONG)
        next(stream)
        flag.write_text(kind)
        with pytest.raises(WorkerError) as error:
            list(stream)
    assert (error.value.code, error.value.retriable) == (code, code == "VRAM_OOM")


def test_leaving_the_loop_stops_the_job(busy: Server) -> None:
    busy.settled()
    with Client(busy.url) as client:
        for event in client.execute("go on", job_id="left", **LONG):
            if isinstance(event, Token):
                break
        busy.settled()
    until(lambda: any(e["job_id"] == "left" for e in busy.events("execute_end")))
    assert [e["outcome"] for e in busy.events("execute_end") if e["job_id"] == "left"] == ["disconnected"]


def test_leaving_the_async_loop_stops_the_job(busy: Server) -> None:
    async def leave() -> None:
        async with AsyncClient(busy.url) as client:
            async with client.execute("go on", **LONG) as stream:
                async for event in stream:
                    if isinstance(event, Token):
                        break
            await asyncio.to_thread(busy.settled)

    busy.settled()
    asyncio.run(leave())


def test_full_queue_and_polite_retries(busy: Server) -> None:
    busy.settled()
    with Client(busy.url) as client, Client(busy.url, retries=20) as patient:
        stream = client.execute("go on", **LONG)
        next(stream)
        error = caught(client)
        assert (error.code, error.status, error.retriable, error.retry_after) == ("QUEUE_FULL", 503, True, 1.0)
        threading.Timer(0.5, lambda: busy.client().post("/cancel", json={"job_id": stream.job_id})).start()
        start = time.monotonic()
        assert patient.generate("go on", max_tokens=3, **LONG).end.tokens_out == 3
        assert time.monotonic() - start >= 1.0
        with pytest.raises(WorkerError, match="CANCELLED"):
            list(stream)


def test_shutdown_and_a_worker_that_has_gone(talker: Path) -> None:
    with serving("--model", talker, "--shutdown-grace-sec", 1) as running, Client(running.url) as client:
        stream = client.execute("go on", **LONG)
        next(stream)
        with Client(running.url) as other:
            other.shutdown()
            refused = caught(other)
            assert (refused.code, refused.status, refused.retriable) == ("SHUTTING_DOWN", 503, True)
        with pytest.raises(WorkerError, match="CANCELLED: the worker is shutting down"):
            list(stream)
        assert running.process.wait(10) == 0
        with pytest.raises(ConnectionFailed, match="cannot be reached"):
            client.health()


def test_a_worker_that_is_killed(talker: Path) -> None:
    with serving("--model", talker) as running, Client(running.url) as client:
        stream = client.execute("go on", **LONG)
        next(stream)
        running.process.kill()
        with pytest.raises(ConnectionFailed, match="connection was lost"):
            list(stream)


# ---- a worker that talks nonsense ------------------------------------------------------------------------------------


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
        ([], "ended without end or error"),
        ([STARTED, token(0)], "ended without end or error"),
        ([STARTED, token(0), END[:-1]], "ended without end or error"),
        ([token(0), END], "token came before started"),
        ([END], "end came before started"),
        ([STARTED, STARTED], "started came twice"),
        ([STARTED.replace(b'"j"', b'"other"')], "of job 'other'"),
        ([STARTED, token(1)], "token 1 came where 0 was due"),
        ([STARTED, token(0), token(0)], "token 0 came where 1 was due"),
        ([STARTED, END], "of 1 tokens 0 came"),
        ([*REPLY, token(1)], "goes on after its end"),
        ([*REPLY, END], "goes on after its end"),
        ([STARTED, b"event: token\ndata: {\n\n"], "token: the data is no JSON: '{'"),
        ([STARTED, b"event: token\ndata: " + b"[" * 100_000 + b"\n\n"], "no JSON"),
        ([STARTED, b"event: token\n\n"], "no JSON: ''"),
        ([STARTED, event("token", [1])], "expected a JSON object"),
        ([STARTED, event("token", {"t": 1, "i": 0})], "t should be of type str, came '1'"),
        ([STARTED, event("token", {"t": "x", "i": True})], "i should be of type int"),
        ([STARTED, event("token", {"t": "x"})], "i should be of type int, came 'null'"),
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
    fault = faults.Fault(code, "words", "prompt")
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
        ([1.0], ConnectionFailed, "sent nothing for 0.3 s"),
        ([HEAD, STARTED, 1.0], ConnectionFailed, "sent nothing for 0.3 s"),
        ([HEAD.replace(b"Connection: close", b"Content-Length: 9999"), STARTED], ConnectionFailed, "lost"),
    ],
)
def test_broken_connections(parts: list[Any], kind: type[ClientError], message: str, twin: bool) -> None:
    with talking(*parts) as url, pytest.raises(kind, match=message):
        read(url, twin, timeout=0.3)


@both
def test_comments_keep_a_waiting_stream_alive(twin: bool) -> None:
    beats: list[Any] = [part for _ in range(8) for part in (0.15, b": waiting\n\n")]
    with talking(HEAD, STARTED, *beats, token(0), END) as url:
        assert len(read(url, twin, timeout=0.6)) == 3


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
        ([CHUNK], ProtocolError, "ended without end or error"),
        ([CHUNK, "[DONE]"], ProtocolError, "before the reason"),
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


# ---- refengine ask ---------------------------------------------------------------------------------------------------


def asked(server: Server, *arguments: object, **options: Any) -> Any:
    given = {"REFENGINE_API_KEY": KEY, **options}
    return subprocess_cli("ask", *arguments, "--url", server.url, **given)


def test_ask(server: Server) -> None:
    result = asked(server, PROMPT, "--temperature", 0.7, "--seed", 42, "--max-tokens", 50)
    with Client(server.url, KEY) as client:
        assert result.out == client.generate(PROMPT, **SAMPLING).text + "\n"
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("refengine: prompt 6 tokens (0 reused), ")
    assert line.endswith("stop: eos, seed 42")


def test_ask_reads_standard_input(server: Server) -> None:
    options = ["--temperature", 0.7, "--seed", 42]
    assert asked(server, "-", *options, stdin=PROMPT.encode()).out == asked(server, PROMPT, *options).out


def test_ask_through_the_chat_template(server: Server) -> None:
    result = asked(server, PROMPT, "--chat", "--temperature", 0.7, "--seed", 1)
    assert (result.code, len(result.out.strip().splitlines())) == (0, 3)
    assert "prompt 14 tokens" in result.err
    assert "stop: stop" in result.err


def test_ask_tells_nothing_of_a_stop_string(server: Server) -> None:
    result = asked(server, PROMPT, "--logprobs", 3, "--temperature", 0.7, "--seed", 42, "--stop", "shader")
    last = result.out.splitlines()[-1].split(maxsplit=1)
    assert last[1] == "(of a stop string)"
    assert "shad" not in result.out


def test_ask_prints_logprobs(server: Server) -> None:
    result = asked(server, PROMPT, "--logprobs", 3, "--temperature", 0.7, "--seed", 42, "--max-tokens", 4)
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 3]
    assert all(line.count("%") == 4 for line in lines)


def test_ask_takes_the_key_from_either_place(server: Server) -> None:
    assert "UNAUTHORIZED" in asked(server, "x", REFENGINE_API_KEY="").error
    assert asked(server, "x", "--max-tokens", 1, "--api-key", KEY, REFENGINE_API_KEY="wrong").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompt once"),
        (["a", "--prompt", "b"], "(2 were given)"),
        (["a", "--chat", "--logprobs", "1"], "--logprobs is not for --chat"),
        (["a", "--url", "nonsense"], "given 'nonsense', allowed http://HOST:PORT"),
        (["a", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_ask_errors_are_one_line(arguments: list[str], message: str) -> None:
    assert message in cli("ask", *arguments).error


def test_ask_tells_the_workers_error(server: Server) -> None:
    assert "INVALID_REQUEST: temperature: given 9" in asked(server, "x", "--temperature", 9).error


def test_ask_waits_where_the_worker_is_full(busy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    busy.settled()
    monkeypatch.setattr(sys, "stdin", io.StringIO("go on"))
    with Client(busy.url) as client, client.execute("go on", **LONG) as stream:
        next(stream)
        assert "QUEUE_FULL" in cli("ask", "-", "--url", busy.url).error
        threading.Timer(0.3, stream_cancel, (busy, stream.job_id)).start()
        assert cli("ask", "go on", "--max-tokens", 2, "--retries", 9, "--url", busy.url).code == 0


def stream_cancel(server: Server, job_id: str | None) -> None:
    with Client(server.url) as client:
        client.cancel(str(job_id))


def test_interrupted_ask_cancels_and_exits_with_130(busy: Server) -> None:
    busy.settled()
    line = [sys.executable, "-m", "refengine", "ask", "go on", "--max-tokens", "2048", "--url", busy.url]
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "refengine: interrupted"
    busy.settled()
    assert busy.events("execute_end")[-1]["outcome"] in ("cancelled", "disconnected")


def test_ask_of_a_worker_that_is_not_there() -> None:
    assert "cannot be reached" in cli("ask", "x", "--url", f"http://127.0.0.1:{free_port()}").error


def test_server_texts_agree(server: Server) -> None:
    """Control: the tests' own reader of streams, which knows nothing of the client, sees the same text."""
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as http, server.stream(http, **HAIKU) as events:
        raw = text_of(list(events))
    with Client(server.url, KEY) as client:
        assert client.generate(PROMPT, **SAMPLING).text == raw
