"""The ready callback: what is announced and when, what counts as heard, and how often it is tried."""

import io
import json
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from refengine.bench.process import free_port
from refengine.model import PACKAGED_MODEL
from refengine.worker import options
from refengine.worker.http import callback
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log
from tests.cli_runner import ENVIRONMENT, ROOT
from tests.worker.server import command, until

UUID = "123e4567-e89b-12d3-a456-426614174000"
HEARD = b"HTTP/1.1 204 No Content\r\n\r\n"
BODY = b'{"worker_id": "w"}'


class Scripted:
    """A server that answers each connection with the next of these bytes, whatever they are; then with the last."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.answers, self.requests = list(answers), list[bytes]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/ready"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            with connection:
                request = b""
                while not request.endswith(BODY) and (part := connection.recv(4096)):
                    request += part
                self.requests.append(request)
                connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])


def announced(
    monkeypatch: pytest.MonkeyPatch, *answers: bytes
) -> tuple[list[bytes], list[float], list[dict[str, Any]]]:
    """The requests that came, the pauses between them, the log."""
    server, stream, pauses = Scripted(answers), io.StringIO(), list[float]()
    monkeypatch.setattr(callback, "time", SimpleNamespace(sleep=pauses.append))
    callback._announce(server.url, BODY, Log(UUID, "m", "cpu", stream))
    server.listener.close()
    return server.requests, pauses, [json.loads(line) for line in stream.getvalue().splitlines()]


def test_only_2xx_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage, half an answer, none, a redirect (which would make a GET of it), a refusal: it comes again, whole."""
    answers = (
        b"what do you want?\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.",
        b"",
        b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n",
    )
    requests, pauses, log = announced(monkeypatch, *answers, HEARD)
    assert len(requests) == 7
    for request in requests:
        assert request.startswith(b"POST /ready HTTP/1.1\r\n")
        assert request.endswith(b"\r\n\r\n" + BODY)
    assert pauses == list(callback.PAUSES_S[:6])
    assert [(line["event"], line["level"]) for line in log] == [("error", "WARNING")] * 6
    assert [line["status"] for line in log] == [None, None, None, None, 302, 503]
    assert "attempt 6 of 7" in log[-1]["message"]


@pytest.mark.parametrize("status", [200, 201, 299])
def test_heard_the_first_time(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Whatever becomes of the answer's body."""
    requests, pauses, log = announced(monkeypatch, b"HTTP/1.1 %d Well\r\nContent-Length: 1000\r\n\r\ncut" % status)
    assert (len(requests), pauses, log) == (1, [], [])


def test_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, pauses, log = announced(monkeypatch, b"HTTP/1.1 500 No\r\n\r\n")
    assert pauses == sorted(set(pauses))
    assert pauses[-1] >= 20 * pauses[0] > 0
    assert len(requests) == len(log) == len(pauses) + 1


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, pauses = io.StringIO(), list[float]()
    monkeypatch.setattr(callback, "time", SimpleNamespace(sleep=pauses.append))
    callback._announce(f"http://127.0.0.1:{free_port()}/", BODY, Log(UUID, "m", "cpu", stream))
    assert pauses == list(callback.PAUSES_S)


def url(host: str, *allowed: str, called: str | None = None) -> str:
    given = WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080, host=host, callback_url=called, allowed_hosts=allowed)
    assert given.url == given.url
    return given.url


def test_a_worker_on_all_addresses_tells_one_that_others_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert url("0.0.0.0", called="http://127.0.0.1:9/ready") == "http://127.0.0.1:8080"
    assert url("::", called="http://127.0.0.1:9/ready") == "http://127.0.0.1:8080"
    for host in ("0.0.0.0", "::", "0:0::0"):
        for called in (None, "http://some.name:9/ready"):
            assert url(host, called=called) not in ("http://0.0.0.0:8080", f"http://[{host}]:8080")
        assert url(host, "worker.test", "other.test") == "http://worker.test:8080"  # the names that it answers to

    def none(*arguments: object) -> socket.socket:
        raise OSError("no such family")

    monkeypatch.setattr(options, "socket", SimpleNamespace(**{**vars(socket), "socket": none}))
    assert url("0.0.0.0") == f"http://{socket.gethostname()}:8080"
    assert url("127.0.0.1", "worker.test") == "http://127.0.0.1:8080"


# `refengine serve` that loads its model once a file is there, and has memory of a device.
LATE = """
import pathlib, sys, time
from refengine.cli import main as cli
from refengine.worker import startup
from refengine.worker.jobs import engine_thread
flag, load = pathlib.Path(sys.argv.pop(1)), startup.load
def late(*arguments, **keywords):
    while not flag.exists():
        time.sleep(0.01)
    return load(*arguments, **keywords)
startup.load = late
engine_thread.vram_of = lambda model: {"weights": 5, "kv": 60, "workspace": 700}
sys.exit(cli.main())
"""


class Caller(HTTPServer):
    """Asks a worker for its health, at the URL it announces, before it answers."""

    def __init__(self) -> None:
        self.heard: list[tuple[dict[str, Any], dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), CallerHandler)


class CallerHandler(BaseHTTPRequestHandler):
    server: Caller

    def do_POST(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers["content-length"])))
        health = httpx.get(f"{told['url']}/health", timeout=10).json()
        self.server.heard.append((told, health))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def caller() -> Iterator[Caller]:
    with Caller() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_model_then_server_then_callback(caller: Caller, tmp_path: Path) -> None:
    """Nobody is listened to before the model is there; whoever is called back can use the URL at once."""
    flag, log_file = tmp_path / "load", tmp_path / "log"
    called = f"http://127.0.0.1:{caller.server_port}/ready"
    line, own = command("--device", "cpu", "--host", "0.0.0.0", "--callback-url", called, script=(LATE, flag))
    with open(log_file, "wb") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stderr=log)
    try:
        until(lambda: b'"percent": 0' in log_file.read_bytes())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{own}/health")
        flag.touch()
        until(lambda: caller.heard)
        told, health = caller.heard[0]
        assert (told["url"], told["model"], told["vram_bytes"]) == (own, "refengine haiku", 765)
        assert (health["status"], health["vram_bytes_used"]) == ("healthy", 765)
        (ready,) = [e for e in map(json.loads, log_file.read_text().splitlines()) if e["event"] == "ready"]
        assert (ready["url"], ready["vram_bytes"]) == (own, 765)
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
