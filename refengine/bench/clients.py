"""The clients of a load test, in a separate process. They send requests and compare the answers with references.

    python -m refengine.bench.clients    (reads a task as JSON from standard input; prints JSON lines, the result last)

The process has a lower priority than the worker, because it shares the worker's cores; real clients run elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from refengine.client.client import AsyncClient
from refengine.client.events import ClientError, End, Event, Started, Token, WorkerError
from refengine.errors import RefengineError

TEMPERATURE = 0.8
MAX_TOKENS = 48
SHOWN_PROBLEMS = 20
PROGRESS_S = 10.0
NICE = 5  # added to the process's nice value, for a lower priority than the worker's


@dataclass(frozen=True)
class Reference:
    """The answer to a prompt and a seed without any load."""

    prompt: str
    seed: int
    text: str
    tokens_out: int
    stop_reason: str


@dataclass
class Tally:
    """The results of all clients. cpu_share: the share of one core that they used; near 1, they limit the result."""

    seconds: float = 0.0
    streams: int = 0
    tokens: int = 0
    refused: int = 0  # responses with status 503, each followed by a retry
    problems: list[str] = field(default_factory=list)
    n_problems: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_token_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    cpu_share: float = 0.0

    def add(self, problems: Sequence[str]) -> None:
        self.n_problems += len(problems)
        self.problems += problems[: max(0, SHOWN_PROBLEMS - len(self.problems))]


@dataclass(frozen=True)
class Task:
    """What the clients do. clients: how many. known: the references to choose from."""

    url: str
    clients: int
    seconds: float
    known: Sequence[Reference]


class Clients:
    """Starts and controls the process of the clients. A context manager, which kills the process at the end.

    task: what the clients do.
    """

    def __init__(self, task: Task) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refengine.bench.clients"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(task)))
        self._process.stdin.close()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def finish(self, progress: Callable[[str], None]) -> Tally:
        """Wait for the clients to end; returns their results. Raises RefengineError if the process fails."""
        assert self._process.stdout is not None
        last = {}
        for line in self._process.stdout:
            last = json.loads(line)
            if "progress" in last:
                progress(last["progress"])
        if self._process.wait() != 0 or "tally" not in last:
            raise RefengineError(f"the clients ended with exit code {self._process.returncode}")
        return Tally(**{**last["tally"], "errors": Counter(last["tally"]["errors"])})


def problems_of(events: Sequence[Event], job_id: str, expected: Reference, others: Sequence[Reference]) -> list[str]:
    """The problems of a stream that has ended, in its order, counts and text; empty if it equals the reference."""
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
            await asyncio.sleep(0.1)  # the worker may have ended
        else:
            tally.streams += 1
            tally.tokens += sum(isinstance(event, Token) for event in events)
            tally.add(problems_of(events, job_id, expected, known))


async def _report_progress(tally: Tally) -> None:
    start = time.perf_counter()
    while True:
        await asyncio.sleep(PROGRESS_S)
        seconds = time.perf_counter() - start
        text = f"{tally.streams} streams, {tally.tokens / seconds:.0f} tokens/s, {tally.n_problems} problems"
        print(json.dumps({"progress": f"{seconds:.0f} s: {text}"}), flush=True)


async def run(task: Task) -> Tally:
    tally = Tally()
    start, cpu = time.perf_counter(), time.process_time()
    async with AsyncClient(task.url) as client:
        reporting = asyncio.create_task(_report_progress(tally))
        await asyncio.gather(
            *(_client(i, client, task.known, start + task.seconds, tally) for i in range(task.clients))
        )
        reporting.cancel()
    tally.seconds = time.perf_counter() - start
    tally.cpu_share = (time.process_time() - cpu) / tally.seconds
    return tally


def main() -> None:
    os.nice(NICE)
    fields = json.load(sys.stdin)
    task = Task(**{**fields, "known": [Reference(**entry) for entry in fields["known"]]})
    print(json.dumps({"tally": asdict(asyncio.run(run(task)))}))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
