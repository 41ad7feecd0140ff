"""What a worker has taken is given back: after a start that fails, and at its end with a job under way.

In this process, so that what is left can be looked for.
"""

import asyncio
import functools
import gc
import io
import json
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

import httpx
import pytest

import refengine
from refengine.bench.process import free_port
from refengine.engine.engine import Engine
from refengine.engine.sampling import SamplingParams
from refengine.worker import server as life
from refengine.worker import startup
from refengine.worker.jobs.engine_thread import EngineThread, Started
from refengine.worker.jobs.job import Job
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log
from refengine.worker.telemetry.metrics import EngineHook
from refengine.worker.telemetry.status import ModelInfo, State
from tests.worker.server import until, write_talker

UUID = "123e4567-e89b-12d3-a456-426614174000"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, weakref.ref[Any]]:
    """What a worker has made so far, by name; as long as it is there."""
    found: dict[str, weakref.ref[Any]] = {}

    def engine(model: Any, *arguments: Any) -> Engine:
        made = Engine(model, *arguments)
        for name, value in {"engine": made, "cache": made.cache, "weights": model.weights, "model": model}.items():
            found[name] = weakref.ref(value)
        return made

    monkeypatch.setattr(startup, "Engine", engine)
    monkeypatch.setattr(EngineHook, "on_start", lambda hook, it: found.setdefault("generation", weakref.ref(it)))
    return found


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def assert_freed(taken: dict[str, weakref.ref[Any]]) -> None:
    until(lambda: "engine" not in threads())
    gc.unfreeze()  # a worker that is ready has frozen all that there was
    for cache in gc.get_objects():
        if isinstance(cache, functools._lru_cache_wrapper) and cache.__module__.startswith("fastapi"):
            cache.cache_clear()  # of routes' functions, which know the worker; of the whole process
    gc.collect()
    assert [name for name, it in taken.items() if it() is not None] == []


def test_a_start_that_fails_frees_what_it_took(talker: Path, taken: dict[str, weakref.ref[Any]]) -> None:
    """The port is the last that can fail, with everything there."""
    stream = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as other:
        options = WorkerOptions(UUID, talker, "cpu", other.getsockname()[1])
        assert asyncio.run(life._live(options, Log(UUID, "m", "cpu", stream))) == 1
    assert json.loads(stream.getvalue().splitlines()[-1])["code"] == "PORT_UNAVAILABLE"
    assert set(taken) == {"engine", "cache", "weights", "model"}
    assert_freed(taken)


def test_a_shutdown_frees_all_of_it(talker: Path, taken: dict[str, weakref.ref[Any]]) -> None:
    stream = io.StringIO()
    options = WorkerOptions(UUID, talker, "cpu", free_port(), shutdown_grace_sec=0.1)
    last: list[str] = []

    def use() -> None:
        """A job that is cut by the shutdown."""
        until(lambda: '"ready"' in stream.getvalue())
        with httpx.Client(base_url=options.url, timeout=30) as client:
            body = {"job_id": "long", "prompt": "go on", "max_tokens": 2048}
            with client.stream("POST", "/execute", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                httpx.post(f"{options.url}/shutdown", timeout=30)
                last.extend(lines)

    user = threading.Thread(target=use)
    user.start()
    assert asyncio.run(life._live(options, Log(UUID, "m", "cpu", stream))) == 0
    user.join()
    assert "CANCELLED" in "".join(last)
    assert set(taken) == {"engine", "cache", "weights", "model", "generation"}
    assert_freed(taken)


@pytest.mark.parametrize("device", ["cpu", "host"])
def test_the_engines_thread_frees_what_still_runs_when_it_stops(device: str, talker: Path) -> None:
    def start() -> Started:
        model = refengine.load(talker, device)
        return Started(Engine(model), State(ModelInfo.of(model)))

    async def run() -> None:
        thread = EngineThread(start, Log(UUID, "m", "cpu", io.StringIO()), 60)
        started = await thread.started
        job = Job("j", lambda: [5], SamplingParams(max_tokens=2000), {})
        job.ids = [5]
        thread.submit(job)
        async with asyncio.timeout(10):
            while not started.state.load.engine.blocks_used:
                await asyncio.sleep(0.005)
        runner: Any = started.engine.runner
        if device == "host":
            async with asyncio.timeout(60):
                while not runner._step.n_ahead:
                    await asyncio.sleep(0.005)
        thread.stop()
        assert thread.join(10)
        if device == "host":
            assert runner._step._ahead is None  # what had been launched ahead was waited for
        assert started.engine.idle
        assert started.engine.stats().blocks_used == 0

    asyncio.run(run())


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("freed"))
