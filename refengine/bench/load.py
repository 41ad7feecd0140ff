"""Many clients at once: is every stream whole, and what it would be alone; how soon is /health; does memory stay flat.

What each (prompt, seed) answers is taken down first, one request after the other. Then all clients ask for those at
random, and every answer is compared.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refengine.bench.figures import Figure
from refengine.bench.probe import Probe
from refengine.bench.process import WorkerProcess
from refengine.bench.prompts import topics
from refengine.client import AsyncClient, Client
from refengine.client_events import ClientError, End, Event, Started, Token, WorkerError

SEEDS = 4  # for each prompt
TEMPERATURE = 0.8
MAX_TOKENS = 48
SETTLED_SHARE = 0.1  # of a run, after which memory is looked at: buffers and pools grow at first
SHOWN_PROBLEMS = 20
PROGRESS_S = 10.0
MIB = 1 << 20


@dataclass(frozen=True)
class Reference:
    """What a prompt and a seed answer alone."""

    prompt: str
    seed: int
    text: str
    tokens_out: int
    stop_reason: str


@dataclass
class Tally:
    """What all clients saw."""

    streams: int = 0
    tokens: int = 0
    refused: int = 0  # answers of 503, each followed by another try
    problems: list[str] = field(default_factory=list)
    n_problems: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_token_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)

    def add(self, problems: Sequence[str]) -> None:
        self.n_problems += len(problems)
        self.problems += problems[: max(0, SHOWN_PROBLEMS - len(self.problems))]


def references(client: Client, prompts: Sequence[str], n_seeds: int = SEEDS) -> list[Reference]:
    """Of all pairs, one request at a time."""
    found = []
    for prompt in prompts:
        for seed in range(n_seeds):
            answer = client.generate(prompt, seed=seed, temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
            found.append(Reference(prompt, seed, answer.text, answer.end.tokens_out, answer.end.stop_reason))
    return found


def problems_of(events: Sequence[Event], job_id: str, expected: Reference, others: Sequence[Reference]) -> list[str]:
    """What is wrong with a stream that has ended: its order, its counts, its text. Nothing: it is as it is alone."""
    if not events or not isinstance(events[0], Started):
        return [f"{job_id}: does not begin with started"]
    started, tokens = events[0], [event for event in events if isinstance(event, Token)]
    ends = [event for event in events if isinstance(event, End)]
    found = []
    if (started.job_id, started.seed) != (job_id, expected.seed):
        found.append(f"{job_id}, seed {expected.seed}: started says {started.job_id}, {started.seed}")
    if sum(isinstance(event, Started) for event in events) != 1:
        found.append(f"{job_id}: started more than once")
    if [token.index for token in tokens] != list(range(len(tokens))):
        found.append(f"{job_id}: tokens are not numbered 0, 1, 2, ...")
    if len(ends) != 1 or events[-1] is not ends[0]:
        return [*found, f"{job_id}: {len(ends)} ends, or something after it"]
    text = "".join(token.text for token in tokens)
    if text != expected.text:
        whose = [r for r in others if r is not expected and r.text == text]
        pairs = enumerate(zip(text, expected.text, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(text), len(expected.text)))
        what = f"it is the answer to {whose[0].prompt!r}, seed {whose[0].seed}" if whose else f"given {text!r}"
        found.append(
            f"{job_id}: {expected.prompt!r}, seed {expected.seed} should be {expected.text!r}; differs from character "
            f"{shared} on, {what}"
        )
    elif (ends[0].tokens_out, ends[0].stop_reason) != (expected.tokens_out, expected.stop_reason):
        found.append(f"{job_id}: ends with {ends[0]}, alone with {expected.tokens_out}, {expected.stop_reason}")
    return found


async def _client(number: int, client: AsyncClient, known: Sequence[Reference], until: float, tally: Tally) -> None:
    draw = random.Random(number)
    count = 0
    while time.perf_counter() < until:
        expected = draw.choice(known)
        job_id = f"load-{number}-{count}"
        count += 1
        events: list[Event] = []
        last = time.perf_counter()
        try:
            async with client.execute(
                expected.prompt, job_id=job_id, seed=expected.seed, temperature=TEMPERATURE, max_tokens=MAX_TOKENS
            ) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Token):
                        now = time.perf_counter()
                        (tally.gaps_ms if event.index else tally.first_token_ms).append(1000 * (now - last))
                        last = now
        except WorkerError as e:
            if e.status == 503 and e.retriable:
                tally.refused += 1
                await asyncio.sleep(draw.uniform(1.0, 1.5) * (e.retry_after or 1.0))
            else:
                tally.errors[e.code] += 1
                tally.add([f"{job_id}: {e}"])
        except ClientError as e:
            tally.errors[type(e).__name__] += 1
            tally.add([f"{job_id}: {e}"])
        else:
            tally.streams += 1
            tally.tokens += sum(isinstance(event, Token) for event in events)
            tally.add(problems_of(events, job_id, expected, known))


async def _watch(worker: WorkerProcess, tally: Tally, until: float, progress: Callable[[str], None]) -> None:
    """Resident memory every second, and a word now and then."""
    start = time.perf_counter()
    spoken = start
    while (now := time.perf_counter()) < until:
        tally.rss.append((now - start, worker.rss()))
        if now - spoken >= PROGRESS_S:
            spoken = now
            progress(
                f"{now - start:.0f} s: {tally.streams} streams, {tally.tokens / (now - start):.0f} tokens/s, "
                f"{tally.n_problems} problems, {tally.rss[-1][1] / MIB:.1f} MiB resident"
            )
        await asyncio.sleep(1.0)


async def _run(
    worker: WorkerProcess, clients: int, known: Sequence[Reference], seconds: float, progress: Callable[[str], None]
) -> Tally:
    tally = Tally()
    until = time.perf_counter() + seconds
    async with AsyncClient(worker.url) as client:
        watching = asyncio.create_task(_watch(worker, tally, until, progress))
        await asyncio.gather(*(_client(i, client, known, until, tally) for i in range(clients)))
        await watching
    return tally


def run_load(
    worker: WorkerProcess, clients: int, seconds: float, progress: Callable[[str], None], n_seeds: int = SEEDS
) -> tuple[list[Figure], dict[str, Any]]:
    """Figures, and what else was seen."""
    with Client(worker.url) as client:
        known = references(client, topics(), n_seeds)
        progress(f"{len(known)} answers are known; {clients} clients ask for them for {seconds:g} s")
        rss_before = worker.rss()
        probe = Probe(worker.url)
        start, cpu = time.perf_counter(), time.process_time()
        tally = asyncio.run(_run(worker, clients, known, seconds, progress))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        health_ms, health_failed = probe.finish()
        used = metric(client.metrics(), "worker_kv_blocks", state="used")
    return _figures(tally, clients, seconds, health_ms, health_failed, used), {
        "clients": clients,
        "seconds": round(wall, 3),
        "streams": tally.streams,
        "tokens": tally.tokens,
        "tokens_per_s": round(tally.tokens / wall, 1),
        "client_cpu_share": round(cpu / wall, 3),  # of one core: near 1, the client would be what is measured
        "rss_bytes_before": rss_before,
        "rss_bytes": [rss for _, rss in tally.rss],
        "rss_slope_bytes_per_s": slope(tally.rss),
        "errors": dict(tally.errors),
        "problems": tally.problems,
    }


def _figures(
    tally: Tally, clients: int, seconds: float, health_ms: list[float], health_failed: int, used: float
) -> list[Figure]:
    who = f"{clients} clients for {seconds:g} s"
    settled = [rss for t, rss in tally.rss if t >= SETTLED_SHARE * seconds] or [0]
    long = seconds >= 60
    growth = slope([(t, rss) for t, rss in tally.rss if t >= SETTLED_SHARE * seconds]) * 60 / MIB
    return [
        Figure("W-1604", "/health under load", "ms", health_ms, 10, "p99", note=f"{who}; another process asks"),
        Figure("W-1604", "/health that failed", "", [float(health_failed)], 0, "max", True),
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
            [growth],
            0.5 if long else None,
            "max",
            note=f"{settled[0] / MIB:.1f} MiB after {SETTLED_SHARE:.0%} of the time, {settled[-1] / MIB:.1f} at the end"
            + ("" if long else "; judged from 60 s on"),
        ),
    ]


def slope(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes a second, by least squares."""
    if len(samples) < 3:
        return 0.0
    times, values = np.array(samples, float).T
    return float(np.polyfit(times, values, 1)[0])


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of this name with these labels, of Prometheus' text format. Raises ClientError."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
    found = [float(line.rsplit(" ", 1)[1]) for line in lines if all(w in line for w in wanted)]
    if not found:
        raise ClientError(f"the worker has no metric {name} {labels}")
    return sum(found)
