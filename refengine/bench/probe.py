"""A process that requests a worker's /health repeatedly, and prints the time of each response in ms as JSON.

    python -m refengine.bench.probe URL    (until standard input ends)

It is a separate process, so that busy clients do not affect the measurement. It keeps one connection open, like a
monitoring system; the pauses between requests are random, so that they are not synchronised with the worker's steps.
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
    """Starts and controls the process of the probe. A context manager, which kills the process at the end."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "refengine.bench.probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # the probe has started

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def finish(self) -> tuple[list[float], int]:
        """Stop the probe; returns the milliseconds of each response, and the number of failed requests."""
        out, _ = self._process.communicate(timeout=60)
        result = json.loads(out)
        return result["ms"], result["failed"]


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
