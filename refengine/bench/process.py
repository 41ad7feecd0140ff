"""Runs a worker in a separate process, as a user does, and measures its start, its memory and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refengine.client.client import Client
from refengine.errors import RefengineError, RequestError

KEPT = ("model_load_complete", "ready", "error", "shutdown")  # the log events that are kept
READY_WITHIN_S = 600.0
EXIT_WITHIN_S = 60.0


class WorkerProcess:
    """A worker's process. A context manager, which kills the process at the end.

    arguments: those of `refengine serve`, without --worker-id and --port.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        port = free_port()
        fixed = ["serve", "--worker-id", str(uuid.uuid4()), "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self._events: dict[str, dict[str, Any]] = {}
        self._last = deque[str](maxlen=5)
        self._ready = threading.Event()
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refengine", *fixed, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C interrupts only the benchmark, which then ends the worker
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> float:
        """Wait until the worker is ready; returns the seconds since the start of the process. Raises RefengineError."""
        if not self._ready.wait(READY_WITHIN_S) or "ready" not in self._events:
            raise RefengineError(f"the worker did not start: {self._reason()}")
        seconds = float(self._events["ready"]["seen"]) - self._started
        with Client(self.url) as client:
            client.health()
        return seconds

    @property
    def load_seconds(self) -> float:
        """The seconds that loading the model took, from the worker's log."""
        return float(self._events["model_load_complete"]["seconds"])

    def rss(self) -> int:
        """The resident memory of the process in bytes. Raises RefengineError if the process has ended."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise RefengineError(f"process {self.pid} has ended: {self._reason()}")

    def terminate(self) -> tuple[float, int]:
        """Send SIGTERM; returns the seconds until the process ended, and its exit code.

        Raises RefengineError if it does not end.
        """
        start = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(EXIT_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise RefengineError(f"the worker is still running {EXIT_WITHIN_S:g} s after SIGTERM") from None
        return time.perf_counter() - start, code

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(5)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _read(self) -> None:
        """Read the whole log, so that the pipe never fills up and blocks the worker."""
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            if b'"execute_' in raw:
                continue
            seen = time.perf_counter()
            line = raw.decode(errors="replace").strip()
            self._last.append(line)
            try:
                event = json.loads(line)
                if event["event"] in KEPT:
                    self._events[event["event"]] = {**event, "seen": seen}
            except (ValueError, KeyError, TypeError):
                continue
            if "ready" in self._events:
                self._ready.set()
        self._ready.set()

    def _reason(self) -> str:
        message = self._events.get("error", {}).get("message")
        return str(message or " / ".join(self._last) or "it logged nothing")


def free_port() -> int:
    """A TCP port that is free now. Raises RequestError if none is found."""
    for _ in range(100):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        if port >= 1024:
            return port
    raise RequestError("no free port above 1023")
