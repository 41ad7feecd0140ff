"""Clients that do not behave, on real sockets: slow, silent, deaf, too many, too large, in the wrong order.

The limits are shortened by the program that serves; what happens at them is the worker's own.
"""

import json
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from refengine.worker.http.connections import MAX_AHEAD_BYTES, RESERVED
from tests.worker.server import HAIKU, Server, serving, text_of, until, write_talker

LIMIT = 12  # connections
# `refengine serve` with the limits of the first argument in place of its own.
HURRIED = """
import json, sys
from refengine.cli import main as cli
from refengine.worker.http import app, connections, stream
for name, value in json.loads(sys.argv.pop(1)).items():
    (owner,) = [module for module in (app, connections, stream) if hasattr(module, name)]
    setattr(owner, name, value)
sys.exit(cli.main())
"""
LIMITS = {
    "HEAD_TIMEOUT_S": 0.6,
    "RESERVED_HEAD_TIMEOUT_S": 0.3,
    "BODY_REST_TIMEOUT_S": 0.6,
    "BODY_TIMEOUT_S": 0.8,
    "SEND_TIMEOUT_S": 0.8,
    "WRITE_TIMEOUT_S": 0.8,
    "CHECK_S": 0.1,
    "SEND_BUFFER_BYTES": 4096,
}
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /execute HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    talker = write_talker(tmp_path_factory.mktemp("worker"))
    arguments = ("--model", talker, "--max-connections", LIMIT)
    with serving(*arguments, script=(HURRIED, json.dumps(LIMITS))) as running:
        yield running


@pytest.fixture(autouse=True)
def _served_afterwards(server: Server) -> Iterator[None]:
    yield
    server.settled()
    assert server.run(prompt="go on", max_tokens=3, seed=1)[-1][0] == "end"
    assert server.process.poll() is None


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection


def received(connection: socket.socket) -> bytes:
    """Everything until the worker closes, which it must do."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:  # reset: closed with something unread
        pass
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(s) for s in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


def answers(server: Server, data: bytes) -> list[int]:
    with closing(connect(server)) as connection:
        connection.sendall(data)
        return statuses(received(connection))


def drip(connection: socket.socket, data: bytes, end: threading.Event) -> None:
    """A byte every 50 ms, until it is done or cannot."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            if end.wait(0.05):
                return
    except OSError:
        return


def drip_until_cut_off(connection: socket.socket, data: bytes) -> None:
    for _ in range(1000):
        try:
            connection.sendall(data)
        except ConnectionError:
            return
        time.sleep(0.01)
    raise AssertionError("the worker took everything")


def test_silent_connection_is_closed(server: Server) -> None:
    with closing(connect(server)) as connection:
        assert received(connection) == b""


def test_idle_connection_is_closed_after_its_answer(server: Server) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(GET + b"\r\n")
        assert statuses(received(connection)) == [200]


@pytest.mark.parametrize("first", [b"", GET + b"\r\n"], ids=["first request", "second request"])
def test_head_that_drips_gets_408(server: Server, first: bytes) -> None:
    start, end = time.monotonic(), threading.Event()
    with closing(connect(server)) as connection:
        connection.sendall(first)
        thread = threading.Thread(target=drip, args=(connection, GET + b"X: " + b"y" * 10_000, end))
        thread.start()
        got = statuses(received(connection))
        end.set()
        thread.join()
    assert got == ([200, 408] if first else [408])
    assert time.monotonic() - start < 5


def test_body_that_drips_gets_408(server: Server) -> None:
    end = threading.Event()
    with closing(connect(server)) as connection:
        connection.sendall(POST + b"Content-Length: 10000\r\n\r\n{")
        thread = threading.Thread(target=drip, args=(connection, b" " * 10_000, end))
        thread.start()
        got = statuses(received(connection))
        end.set()
        thread.join()
    assert got == [408]


def test_body_that_nobody_waits_for_is_not_waited_for_long(server: Server) -> None:
    """The answer is there at once; the rest of what was announced has a limit, however it comes."""
    end = threading.Event()
    with closing(connect(server)) as connection:
        connection.sendall(GET + b"Content-Length: 1000000\r\n\r\n")
        thread = threading.Thread(target=drip, args=(connection, b" " * 10_000, end))
        thread.start()
        got = statuses(received(connection))
        end.set()
        thread.join()
    assert got == [200]


REFUSED = {
    "no HTTP": (b"\x16\x03\x01\x00\xff garbage\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: other\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "long request line": (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "large header": (GET + b"X: " + b"y" * 20_000 + b"\r\n\r\n", 431),
    "large header without end": (GET + b"X: " + b"y" * 200_000, 431),
    "many headers": (GET + b"".join(b"X%d: y\r\n" % i for i in range(101)) + b"\r\n", 431),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    "length and chunks": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
    "chunks in HTTP/1.0": (POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "unknown encoding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "length with a sign": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "length of text": (POST + b"Content-Length: two\r\n\r\n{}", 400),
    "space before the colon": (POST + b"Content-Length : 2\r\n\r\n{}", 400),
    "chunk of no size": (POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n", 400),
    "chunk of a huge size": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 40 + b"\r\n{}", 400),
    "chunk too long": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_request_that_is_read_here(server: Server, case: str) -> None:
    """One answer, of ours, and the end: nothing behind it is taken for a second request."""
    data, status = REFUSED[case]
    with closing(connect(server)) as connection:
        connection.sendall(data + GET + b"\r\n")
        got = received(connection)
    assert statuses(got) == [status]
    body = json.loads(got.partition(b"\r\n\r\n")[2])
    assert (body["code"], body["field"]) == ("INVALID_REQUEST", None)
    assert body["message"].isprintable()


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    assert answers(server, (GET + b"\r\n") * 3 + GET.replace(b"health", b"nothing") + b"\r\n") == [200, 200, 200, 404]


def test_client_that_sends_on_and_on_while_it_is_answered(server: Server) -> None:
    body = json.dumps({"job_id": "ahead", "prompt": "go on", "seed": 5}).encode()
    with closing(connect(server)) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200" in connection.recv(100)
        drip_until_cut_off(connection, b"x" * (MAX_AHEAD_BYTES // 8))
    assert server.outcome_of("ahead") == "disconnected"


def test_client_that_pipelines_and_goes_is_noticed(server: Server) -> None:
    body = json.dumps({"job_id": "gone", "prompt": "go on", "seed": 5}).encode()
    with closing(connect(server)) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body + GET + b"\r\n")
        assert b"200" in connection.recv(100)
    assert server.outcome_of("gone") == "disconnected"


def test_client_that_does_not_read_its_stream_loses_it(server: Server) -> None:
    body = json.dumps({"job_id": "deaf", "prompt": "go on", "seed": 5, "logprobs": 20}).encode()
    with closing(connect(server, receive_buffer=2048)) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200" in connection.recv(100)
        assert server.outcome_of("deaf") == "disconnected"
        server.settled()  # while the client is still there
        until(lambda: len(sockets(server)) == 1)  # the one that listens


def test_client_that_does_not_read_an_answer_is_cut_off(server: Server) -> None:
    """/openapi.json asked for again and again: more than all buffers hold, and nobody takes it."""
    until(lambda: len(sockets(server)) == 1)
    with closing(connect(server, receive_buffer=2048)) as connection:
        request = GET.replace(b"health", b"openapi.json") + b"\r\n"
        connection.settimeout(0.2)
        try:
            for _ in range(200):
                connection.sendall(request)
        except OSError:
            pass
        until(lambda: len(sockets(server)) == 1)


def sockets(server: Server) -> list[str]:
    """The worker's open TCP sockets: one that listens, and its connections."""
    folder = Path(f"/proc/{server.process.pid}/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    port = f":{int(server.url.rsplit(':', 1)[1]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(port)}
    found = []
    for link in list(folder.iterdir()):
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target in inodes:
            found.append(target)
    return found


def test_beyond_the_limit_only_health_is_answered_and_then_nothing(server: Server) -> None:
    until(lambda: len(sockets(server)) == 1)
    idle = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n"  # open for as long as its body lacks
    with ExitStack() as stack:
        held = [stack.enter_context(closing(connect(server))) for _ in range(LIMIT)]
        for connection in held:
            connection.sendall(idle)
            assert b"200" in connection.recv(1000)
        assert answers(server, GET + b"\r\n") == [200]
        with closing(connect(server)) as more:
            more.sendall(GET.replace(b"health", b"metrics") + b"\r\n")
            got = received(more)
        assert statuses(got) == [503]
        assert b"retry-after: 1" in got.lower()
        assert b"connection: close" in got.lower()
        assert json.loads(got.partition(b"\r\n\r\n")[2])["code"] == "QUEUE_FULL"
        reserve = [stack.enter_context(closing(connect(server))) for _ in range(RESERVED + 1)]
        got = received(reserve[-1])  # sent away unread
        assert statuses(got) == [503]
        assert b"Retry-After: 1" in got
        assert [received(connection) for connection in reserve[:-1]] == [b""] * RESERVED
        until(lambda: len(sockets(server)) == 1)  # those held have had their time
    assert answers(server, GET + b"Connection: close\r\n\r\n") == [200]


def test_resets_leave_nothing(server: Server) -> None:
    until(lambda: len(sockets(server)) == 1)
    for data in (b"", GET, GET + b"\r\n", POST + b"Content-Length: 9\r\n\r\n{") * 10:
        connection = connect(server)
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    until(lambda: len(sockets(server)) == 1)


def test_signal_ends_a_worker_that_has_such_clients(tmp_path: Path) -> None:
    with serving("--max-connections", 3) as server, ExitStack() as stack:
        for data in (b"", GET, POST + b"Content-Length: 9\r\n\r\n{", b"", b"", b"junk\r\n\r\n"):
            stack.enter_context(closing(connect(server))).sendall(data)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - start < 8  # 5 s at most, and some for a busy machine


def test_host_that_a_page_has_rebound_is_refused(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    for name in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}", "LocalHost:1"):
        assert answers(server, f"GET /health HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode()) == [
            200
        ], name
    rebound = ("evil.test", f"evil.test:{port}", "127.0.0.1.evil.test", "localhost.evil.test", "", "[::1].evil.test")
    for name in rebound[:-1]:
        head = f"HTTP/1.1\r\nHost: {name}\r\nOrigin: http://{name}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert answers(server, f"POST /shutdown {head}".encode()) == [421], name
    assert answers(server, b"GET /health HTTP/1.0\r\n\r\n") == [200]  # no browser


def test_names_of_hosts_where_they_are_checked() -> None:
    from refengine.worker.options import WorkerOptions

    def hosts(host: str, *allowed: str) -> frozenset[str] | None:
        return WorkerOptions(
            "123e4567-e89b-12d3-a456-426614174000", Path("m"), "cpu", 8080, host=host, allowed_hosts=allowed
        ).hosts

    always = frozenset({"localhost", "127.0.0.1", "::1"})
    assert hosts("127.0.0.1") == hosts("::1") == hosts("localhost") == always
    assert hosts("127.0.0.2") == always | {"127.0.0.2"}
    assert hosts("0.0.0.0") is None
    assert hosts("worker.example") is None
    assert hosts("0.0.0.0", "Worker.example") == always | {"0.0.0.0", "worker.example"}


def test_allowed_host_is_answered_on_any_address() -> None:
    with serving("--host", "0.0.0.0", "--allowed-host", "worker.test") as server:
        for name, status in (("worker.test:80", 200), ("localhost", 200), ("evil.test", 421)):
            assert answers(server, f"GET /health HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode()) == [
                status
            ]
        assert text_of(server.run(**HAIKU))
