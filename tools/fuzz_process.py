"""The worker that `fuzz_worker.py` tests: its process, log and resources."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from refengine.bench.load import metric
from refengine.bench.process import free_port

ANSWER_WITHIN_S = 60.0


class WorkerUnderTest:
    """A worker's process with its log in a file. program: Python arguments to use instead of `-m refengine`."""

    def __init__(self, folder: Path, arguments: Sequence[str], program: Sequence[str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        line = [sys.executable, *program, "serve", "--worker-id", str(uuid.uuid4()), "--port", str(self.port)]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen([*line, *arguments], stderr=log, stdout=log)
        end = time.monotonic() + 60
        while b'"ready"' not in self._log.read_bytes():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the worker does not start:\n{self._log.read_text()}")
            time.sleep(0.05)

    def rss(self) -> int:
        return int(self._proc("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def n_descriptors(self) -> int:
        return len(list(self._proc("fd").iterdir()))

    def n_threads(self) -> int:
        return len(list(self._proc("task").iterdir()))

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.process.pid}/{name}")

    def metric(self, name: str, **labels: str) -> float:
        return metric(httpx.get(f"{self.url}/metrics", timeout=ANSWER_WITHIN_S).text, name, **labels)

    def unexpected(self) -> list[str]:
        """The lines of the log that no request may cause."""
        found = []
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                found.append(line)
                continue
            if event["level"] in ("ERROR", "CRITICAL") or event.get("kind"):
                found.append(line)
        return found

    def end(self) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def worker_under_test(arguments: Sequence[str], program: Sequence[str]) -> Iterator[WorkerUnderTest]:
    with tempfile.TemporaryDirectory() as folder:
        worker = WorkerUnderTest(Path(folder), arguments, program)
        try:
            yield worker
        finally:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
