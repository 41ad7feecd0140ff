"""A device that fails: what is told, to whom, and when all is well again; and its memory, the same wherever it is told.

The worker takes the CPU for a GPU, whose memory by purpose is a few made-up numbers: what follows is its own.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refengine.bench.load import metric
from tests.worker.server import FAULTY, Server, read, serving, text_of, until, write_talker

ON_GPU = """
import dataclasses
from refengine.worker.jobs import engine_thread
from refengine.worker.telemetry import status as facts
of = facts.ModelInfo.of
facts.ModelInfo.of = staticmethod(lambda model: dataclasses.replace(of(model), device="cuda:0"))
engine_thread.vram_of = lambda model: {"weights": 3_000_000, "kv": 200_000, "workspace": 10_000}
"""
VRAM = {"weights": 3_000_000, "kv": 200_000, "workspace": 10_000}
LONG = {"prompt": "go on", "seed": 5}
SHORT = {**LONG, "max_tokens": 5}


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flag") / "fail"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, flag: Path) -> Iterator[Server]:
    """Two requests run, two wait."""
    talker = write_talker(tmp_path_factory.mktemp("talker"))
    options = ("--model", talker, "--max-batch", 2, "--max-queue", 2)
    with serving(*options, script=(ON_GPU + FAULTY, flag)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    """What a short request says when nothing disturbs it."""
    return text_of(server.run(**SHORT))


@pytest.fixture(autouse=True)
def _slowly(flag: Path) -> Iterator[None]:
    """Until a step fails, so that nothing ends by itself before."""
    flag.write_text("slow")
    yield
    flag.unlink(missing_ok=True)


def test_a_device_that_fails_is_unhealthy_until_a_step_is_good(server: Server, flag: Path, expected: str) -> None:
    assert server.health()["status"] == "healthy"
    for _ in range(2):
        flag.write_text("slow")
        with server.client() as client, server.stream(client, **LONG) as events:
            read(events, 3)
            flag.write_text("device")
            name, data = list(events)[-1]
        assert (name, data["code"], data["retriable"]) == ("error", "CUDA_ERROR", True)
        assert "CUDARuntimeError" in data["message"]
        health = server.health()
        assert (health["status"], health["reasons"]) == ("unhealthy", [data["message"]])
        line = server.events("error")[-1]
        assert (line["level"], line["kind"]) == ("ERROR", "CUDARuntimeError")
        assert "secret" not in server.log_file.read_text() + str(data)
        server.settled()
        assert server.health()["status"] == "unhealthy"  # still: nothing has shown that it works
    assert text_of(server.run(**SHORT)) == expected
    health = server.health()
    assert (health["status"], health["reasons"]) == ("healthy", [])


@pytest.mark.parametrize(("kind", "code"), [("memory", "VRAM_OOM"), ("bug", "INTERNAL")])
def test_what_is_not_the_devices_fault_leaves_it_healthy(
    server: Server, flag: Path, expected: str, kind: str, code: str
) -> None:
    with server.client() as client, server.stream(client, **LONG) as events:
        read(events, 3)
        flag.write_text(kind)
        assert list(events)[-1][1]["code"] == code
    assert server.health()["status"] == "healthy"
    server.settled()
    assert text_of(server.run(**SHORT)) == expected


def test_a_step_without_memory_ends_what_runs_and_not_what_waits(server: Server, flag: Path, expected: str) -> None:
    with (
        ThreadPoolExecutor(2) as pool,
        server.client() as client,
        server.client() as other,
        server.stream(client, **LONG) as first,
        server.stream(other, **LONG) as second,
    ):
        for events in (first, second):
            read(events, 2)
        waiting = [pool.submit(server.run, **SHORT) for _ in range(2)]
        until(lambda: server.metric("worker_queue_depth") == 2)
        flag.write_text("memory")
        for events in (first, second):
            name, data = list(events)[-1]
            assert (name, data["code"], data["retriable"]) == ("error", "VRAM_OOM", True)
        for answer in waiting:
            assert answer.result()[-1][0] == "end"
            assert text_of(answer.result()) == expected
    server.settled()
    assert server.health()["status"] == "healthy"


def test_memory_is_the_same_wherever_it_is_told(server: Server) -> None:
    total = sum(VRAM.values())
    server.run(**SHORT, job_id="told")
    health = server.health()
    assert (health["device"], health["vram_bytes"], health["vram_bytes_used"]) == ("cuda:0", VRAM, total)
    (end,) = [line for line in server.events("execute_end") if line["job_id"] == "told"]
    assert end["vram_bytes"] == total
    assert server.events("ready")[0]["vram_bytes"] == total
    text = server.metrics()
    assert {kind: metric(text, "worker_vram_bytes", kind=kind) for kind in VRAM} == VRAM
