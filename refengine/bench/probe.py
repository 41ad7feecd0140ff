"""A process that asks a worker's /health again and again, and writes what each answer took, in ms, as JSON.

    python -m refengine.bench.probe URL    (until standard input ends)

In a process of its own, so that what it measures is the worker and not a busy client beside it. One connection is kept,
as monitors do; pauses between requests are drawn, so that they do not fall into step with the worker.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import select
import subprocess
import sys
import time
from urllib.parse import urlsplit

PAUSE_S = (0.05, 0.1)
TIMEOUT_S = 10.0


class Probe:
    """The process, from outside. Use it as a context: it is killed at the end if it still runs."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "refengine.bench.probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def finish(self) -> tuple[list[float], int]:
        """Milliseconds of each answer, and how many requests failed."""
        out, _ = self._process.communicate(timeout=60)
        found = json.loads(out)
        return found["ms"], found["failed"]


def main(url: str) -> None:
    host = urlsplit(url).netloc
    draw = random.Random(0)
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    took, failed = [], 0
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], draw.uniform(*PAUSE_S))[0]:
        start = time.perf_counter()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            healthy = answer.status == 200 and json.loads(answer.read())["status"] == "healthy"
        except (OSError, ValueError, http.client.HTTPException):
            connection.close()
            healthy = False
        if healthy:
            took.append((time.perf_counter() - start) * 1000)
        else:
            failed += 1
    print(json.dumps({"ms": took, "failed": failed}))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1])
