"""The client with a real worker: every event and route, refusals, ends, a worker that goes."""

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from refengine.client.client import AsyncClient, ChatEnd, Client, Piece
from refengine.client.events import (
    ConnectionFailed,
    End,
    Started,
    Token,
    WorkerError,
)
from refengine.errors import RequestError
from tests.worker.server import FAULTY, HAIKU, Server, serving, text_of, until, write_talker

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


@pytest.fixture
def slowly(flag: Path) -> Iterator[None]:
    """Steps of `busy` take so long that no machine is done too soon."""
    flag.write_text("slow")
    yield
    flag.unlink(missing_ok=True)


def caught(client: Client, prompt: str = "go on", **options: Any) -> WorkerError:
    with pytest.raises(WorkerError) as error:
        list(client.execute(prompt, **options))
    return error.value


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
    with Client(server.url) as client, pytest.raises(RequestError, match="no time zone"):
        list(client.execute("x", deadline=datetime.now()))


@pytest.mark.usefixtures("slowly")
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
        late = caught(client, deadline=1.5, **LONG)
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


@pytest.mark.usefixtures("slowly")
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


def test_server_texts_agree(server: Server) -> None:
    """Control: the tests' own reader of streams, which knows nothing of the client, sees the same text."""
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as http, server.stream(http, **HAIKU) as events:
        raw = text_of(list(events))
    with Client(server.url, KEY) as client:
        assert client.generate(PROMPT, **SAMPLING).text == raw
