"""Parts of the worker that a process cannot show from outside: residency, the log's two forms, a thread that ends."""

import asyncio
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

import refengine
from refengine.engine.engine import Engine
from refengine.engine.sampling import SamplingParams
from refengine.errors import DeviceError
from refengine.worker.errors import WorkerError
from refengine.worker.http import app, stream
from refengine.worker.jobs import engine_thread
from refengine.worker.jobs.engine_thread import EngineThread, Started
from refengine.worker.jobs.job import Job
from refengine.worker.telemetry import status as facts
from refengine.worker.telemetry.log import Log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_is_json_on_a_file_and_words_on_a_terminal() -> None:
    file, terminal = io.StringIO(), Terminal()
    for place in (file, terminal):
        Log("id", "model", "cpu", place)("ready", url="http://x", seconds=None, job_id="\x1b[2J")
    line = json.loads(file.getvalue())
    assert (line["event"], line["level"], line["worker_id"], line["url"]) == ("ready", "INFO", "id", "http://x")
    assert terminal.getvalue().endswith("INFO ready url=http://x job_id=\\x1b[2J\n")


def test_log_outlives_its_reader() -> None:
    stream = io.StringIO()
    log = Log("id", "model", "cpu", stream)
    stream.close()
    log("ready")


def test_failure_tells_where_and_not_what() -> None:
    stream = io.StringIO()
    try:
        raise ValueError("a prompt")
    except ValueError as e:
        Log("id", "model", "cpu", stream).failure(e, job_id="j")
    line = json.loads(stream.getvalue())
    assert (line["kind"], line["job_id"], line["level"]) == ("ValueError", "j", "ERROR")
    assert "test_parts.py" in line["where"][-1]
    assert "a prompt" not in stream.getvalue()


def started() -> Started:
    model = refengine.load()
    return Started(Engine(model), facts.State(facts.ModelInfo.of(model)))


async def until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def test_residency_is_checked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[object] = []

    def moved(model: object) -> None:
        checks.append(model)
        if len(checks) == 2:
            raise DeviceError("weights arena at 0x7f is no plain device memory")

    monkeypatch.setattr(engine_thread, "check_residency", moved)
    stream = io.StringIO()

    async def run() -> None:
        thread = EngineThread(started, Log("id", "model", "cuda:0", stream), 0.02)
        state = (await thread.started).state
        assert state.health()["status"] == "healthy"
        await until(lambda: len(checks) >= 3)
        health = state.health()
        assert (health["status"], health["resident"]) == ("unhealthy", False)
        assert health["reasons"] == ["weights arena at 0x7f is no plain device memory"]
        thread.stop()
        assert thread.join(5)

    asyncio.run(run())
    assert json.loads(stream.getvalue().splitlines()[0])["level"] == "CRITICAL"


def test_a_thread_that_ends_by_a_bug_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    listener: Any = SimpleNamespace(on_start=lambda *a: None, on_error=lambda *a: told.append(a))

    def broken(model: object) -> dict[str, int]:
        raise ZeroDivisionError

    async def run() -> None:
        thread = EngineThread(started, Log("id", "model", "cpu", io.StringIO()), 60)
        state = (await thread.started).state
        thread.listener = listener
        monkeypatch.setattr(engine_thread, "vram_of", broken)
        job = Job("j", lambda: [5], SamplingParams(), {})
        job.ids = [5]
        thread.submit(job)
        await until(lambda: told)
        assert told[-1][0] is job
        assert told[-1][1].code == "INTERNAL"
        assert state.health()["status"] == "unhealthy"
        assert thread.join(5)
        with pytest.raises(WorkerError):
            thread.submit(job)

    asyncio.run(run())


def test_a_start_that_fails_is_the_result() -> None:
    def fails() -> Started:
        raise DeviceError("no such device")

    async def run() -> None:
        thread = EngineThread(fails, Log("id", "model", "cpu", io.StringIO()), 60)
        with pytest.raises(DeviceError, match="no such device"):
            await thread.started

    asyncio.run(run())


class Slow:
    """A request whose body does not come to its end; a connection that nobody reads from."""

    async def stream(self) -> Any:
        yield b"{"
        await asyncio.sleep(60)

    async def receive(self) -> Any:
        await asyncio.sleep(60)

    async def send(self, message: object) -> None:
        await asyncio.sleep(60)


def test_a_body_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.02)
    request: Any = Slow()
    with pytest.raises(WorkerError, match="did not arrive within") as caught:
        asyncio.run(app.read_body(request))
    assert caught.value.status == 408


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_TIMEOUT_S", 0.02)
    left: list[Job] = []
    worker: Any = SimpleNamespace(disconnected=left.append, options=SimpleNamespace(heartbeat_sec=60))

    async def run() -> None:
        job = Job("j", lambda: [5], SamplingParams(), {})
        await stream.EventStream(worker, [job], stream.sse)({"type": "http"}, Slow().receive, Slow().send)
        assert left == [job]

    asyncio.run(run())
