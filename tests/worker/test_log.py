"""A log that nobody reads holds nothing up: not a request, not the end; what is lost of it is counted."""

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from refengine.worker.telemetry import log as log_module
from refengine.worker.telemetry.log import Log
from tests.cli_runner import ENVIRONMENT, ROOT
from tests.worker.server import command, until

QUEUE = 100


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], Log]]:
    """What is to be read of a log, and the log."""
    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "w") as stream:
        log = Log("id", "model", "cpu", stream)
        log.write_behind()
        yield reader, log
        stream.close()
        list(reader)


def parsed(lines: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def test_lines_come_in_order_and_at_once(pipe: tuple[IO[bytes], Log]) -> None:
    reader, log = pipe
    for i in range(200):
        log("ready", job_id=i)
        if i % 7 == 0:
            log.failure(ValueError())
    assert [line["job_id"] for line in parsed(itertools.islice(reader, 229)) if "job_id" in line] == list(range(200))


def test_lines_that_nobody_reads_are_lost_and_counted(
    pipe: tuple[IO[bytes], Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "QUEUE_LINES", QUEUE)
    reader, log = pipe
    start = time.monotonic()
    for i in range(3000):
        log("ready", job_id=i)
    assert time.monotonic() - start < 5  # a busy machine; it would wait for ever
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.extend(map(json.loads, reader)))
    thread.start()
    writer: Any = log._writer
    writer.drain(10)
    log("shutdown")  # it moves again
    writer.drain(10)
    log._stream.close()
    thread.join()
    due = 0
    for line in found[:-1]:
        if "lines_lost" in line:
            assert (line["event"], line["level"]) == ("error", "WARNING")
            due += line["lines_lost"]
        else:
            assert line["job_id"] == due
            due += 1
    assert due == 3000
    assert QUEUE < len(found) < 2000
    assert found[-1]["event"] == "shutdown"


def test_the_end_waits_for_a_reader_and_not_for_ever(pipe: tuple[IO[bytes], Log]) -> None:
    reader, log = pipe
    writer: Any = log._writer
    log("ready")
    writer.drain(10)
    assert b"ready" in os.read(reader.fileno(), 1000)
    for _ in range(1000):
        log("ready")
    start = time.monotonic()
    writer.drain(0.2)
    assert 0.2 <= time.monotonic() - start < 5


@contextmanager
def process_of(stderr: int, *arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A worker and its URL."""
    line, url = command("--device", "cpu", *arguments)
    with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stderr=stderr) as process:
        try:
            yield process, url
        finally:
            process.kill()


@pytest.mark.parametrize("is_read", [False, True], ids=["never read", "read at the end"])
def test_worker_whose_log_nobody_reads(is_read: bool) -> None:
    with process_of(subprocess.PIPE) as (process, url), httpx.Client(base_url=url, timeout=10) as client:
        assert process.stderr is not None
        until(lambda: b'"ready"' in process.stderr.readline(), 30)
        for i in range(800):  # of 200 bytes in the log each, more than a pipe of 64 KiB takes
            assert client.post("/execute", json={"job_id": f"refused {i}"}).status_code == 400
        assert client.get("/health").json()["status"] == "healthy"
        start = time.monotonic()
        if is_read:
            process.send_signal(signal.SIGTERM)
            lines = parsed(process.stderr)
            assert lines[-1]["event"] == "shutdown"
            assert len(lines) == 801
        else:
            assert client.post("/shutdown").status_code == 202
        assert process.wait(10) == 0
        assert time.monotonic() - start < 5
        if not is_read:
            assert 100 < len(parsed(process.stderr)) < 800  # whole lines


def test_into_a_file_lines_are_written_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as stream:
        log = Log("id", "model", "cpu", stream)
        log.write_behind()
        for i in range(50):
            log("ready", job_id=i)
            assert parsed((tmp_path / "log").read_text().splitlines())[-1]["job_id"] == i


def test_start_that_fails_while_nobody_reads(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while True:
        try:
            os.write(writing, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(writing, True)
    with process_of(writing, "--model", tmp_path / "none.gguf") as (process, _):
        assert process.wait(20) == 1
    os.close(reading)
    os.close(writing)
