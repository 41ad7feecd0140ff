"""The load test with many clients: checks every stream, the latency of /health, and the growth of memory.

First, the answer to each (prompt, seed) is recorded, one request at a time. Then all clients request them at random,
and every answer is compared with the recorded one. The clients and the probe of /health run in separate processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refengine.bench.clients import MAX_TOKENS, TEMPERATURE, Clients, Reference, Tally, Task
from refengine.bench.figures import Figure
from refengine.bench.probe import Probe
from refengine.bench.process import WorkerProcess
from refengine.bench.prompts import topics
from refengine.client.client import Client
from refengine.client.events import ClientError
from refengine.errors import RefengineError

SEEDS = 4  # per prompt
SETTLED_SHARE = 0.1  # of the run is over before memory is measured, because buffers and pools grow at first
JUDGED_FROM_S = 60.0  # the least duration of a run for which the growth of memory is judged
MIB = 1 << 20

Rss = list[tuple[float, int]]  # seconds and bytes


def references(client: Client, prompts: Sequence[str], n_seeds: int = SEEDS) -> list[Reference]:
    """Record the answers to all pairs of prompt and seed, one request at a time."""
    result = []
    for prompt in prompts:
        for seed in range(n_seeds):
            answer = client.generate(prompt, seed=seed, temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
            result.append(Reference(prompt, seed, answer.text, answer.end.tokens_out, answer.end.stop_reason))
    return result


class _Watch:
    """Records the resident memory of the worker every second."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.seen: Rss = []
        self._worker, self._stop = worker, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> Rss:
        self._stop.set()
        self._thread.join()
        return self.seen

    def _run(self) -> None:
        start = time.perf_counter()
        while not self._stop.is_set():
            try:
                self.seen.append((time.perf_counter() - start, self._worker.rss()))
            except (OSError, RefengineError):  # the worker has ended, which the clients notice too
                return
            self._stop.wait(1.0)


def run_load(
    worker: WorkerProcess, clients: int, seconds: float, progress: Callable[[str], None], n_seeds: int = SEEDS
) -> tuple[list[Figure], dict[str, Any]]:
    """Run the load test; returns the figures, and further results as JSON data."""
    with Client(worker.url) as client:
        known = references(client, topics(), n_seeds)
        progress(f"{len(known)} answers recorded; {clients} clients now request them for {seconds:g} s")
        watch = _Watch(worker)
        with Probe(worker.url) as probe, Clients(Task(worker.url, clients, seconds, known)) as asking:
            tally = asking.finish(progress)
            health = probe.finish()
        rss = watch.finish()
        used = metric(client.metrics(), "worker_kv_blocks", state="used")
    return _figures(tally, clients, seconds, health, used, rss), {
        "clients": clients,
        "seconds": round(tally.seconds, 3),
        "streams": tally.streams,
        "tokens": tally.tokens,
        "tokens_per_s": round(tally.tokens / tally.seconds, 1),
        "client_cpu_share": round(tally.cpu_share, 3),
        "rss_bytes": [n for _, n in rss],
        "rss_slope_bytes_per_s": slope(rss),
        "errors": dict(tally.errors),
        "problems": tally.problems,
    }


def _figures(
    tally: Tally, clients: int, seconds: float, health: tuple[list[float], int], used: float, rss: Rss
) -> list[Figure]:
    who = f"{clients} clients for {seconds:g} s, at a lower priority than the worker, on its cores"
    settled = [(t, n) for t, n in rss if t >= SETTLED_SHARE * seconds] or rss
    first, last = settled[0][1] / MIB, settled[-1][1] / MIB
    judged = seconds >= JUDGED_FROM_S
    return [
        Figure("W-1604", "/health under load", "ms", health[0], 10, "p99", note=f"{who}; a process of its own asks"),
        Figure("W-1604", "/health that failed", "", [float(health[1])], 0, "max", True),
        Figure("load", "first token, from request", "ms", tally.first_token_ms, note="waiting in the queue included"),
        Figure("load", "between tokens, of a stream", "ms", tally.gaps_ms),
        Figure(
            "load",
            "streams that are not whole, or not what they are alone",
            "",
            [float(tally.n_problems)],
            0,
            "max",
            True,
            f"of {tally.streams} that ended",
        ),
        Figure("load", "answers of 503", "", [float(tally.refused)], 0, "max", True, "each asked again"),
        Figure("load", "KV blocks in use afterwards", "", [used], 0, "max", True),
        Figure(
            "load",
            "growth of resident memory",
            "MiB/min",
            [slope(settled) * 60 / MIB],
            0.5 if judged else None,
            "max",
            note=f"{first:.1f} MiB after {SETTLED_SHARE:.0%} of the time, {last:.1f} at the end"
            + ("" if judged else f"; judged from {JUDGED_FROM_S:g} s on"),
        ),
    ]


def slope(samples: Sequence[tuple[float, int]]) -> float:
    """The growth in bytes per second, by least squares."""
    if len(samples) < 3:
        return 0.0
    times, values = np.array(samples, float).T
    return float(np.polyfit(times, values, 1)[0])


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, from Prometheus' text format. Raises ClientError."""
    pairs = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if all(pair in line for pair in pairs)]
    if not values:
        raise ClientError(f"the worker has no metric {name} {labels}")
    return sum(values)
