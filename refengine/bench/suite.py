"""The performance suite: measures over HTTP every speed for which the worker has a target.

One worker is started with empty kernel caches, others with filled ones. Each is ended by SIGTERM while it streams; the
last one is used for all other measurements. A measurement ends after a number of samples or a time, whichever is first.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from refengine.bench.figures import Figure
from refengine.bench.load import metric, run_load
from refengine.bench.process import WorkerProcess
from refengine.bench.prompts import prompt_of, topics
from refengine.client.client import Client, Stream
from refengine.client.events import ClientError, End, Event, Started, Token, WorkerError
from refengine.worker.http.requests import MAX_PROMPT_CHARS, ExecuteRequest, parse

PROMPT_TOKENS = 512
LONG_TEMPERATURE = 2.0  # makes nearly random text, so that almost no answer ends by itself
ENOUGH = 5  # the least number of samples of a measurement, even if the time is over
SETTLE_S = 30.0
MAX_TOKENS = 2048
MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """The number of samples of each measurement, and its maximum time in seconds."""

    first_tokens: int = 100
    gaps: int = 2000
    parses: int = 1000
    cancels: int = 50
    leak_requests: int = 100
    starts: int = 5
    exit_streams: int = 32
    load_clients: int = 16
    load_s: float = 20.0
    budget_s: float = 20.0


QUICK = Plan(
    first_tokens=3,
    gaps=60,
    parses=50,
    cancels=3,
    leak_requests=10,
    starts=1,
    load_clients=8,
    load_s=2.0,
    budget_s=3.0,
)


class Suite:
    """Runs all measurements. arguments: for `refengine serve`. compiles: whether a first start compiles kernels."""

    def __init__(self, arguments: Sequence[str], compiles: bool, plan: Plan, progress: Callable[[str], None]) -> None:
        self._arguments, self._compiles, self._plan, self._say = arguments, compiles, plan, progress
        self.facts: dict[str, Any] = {}  # the worker's health, and the results of the load test

    def run(self) -> list[Figure]:
        """Run all measurements. Raises RefengineError if a worker does not start, or answers with an error."""
        cold, warm, loads, exits = [], [], [], []
        if self._compiles:
            with tempfile.TemporaryDirectory() as empty:
                caches = dict.fromkeys(("REFENGINE_CACHE", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"), empty)
                self._say("starting a worker without compiled kernels")
                with WorkerProcess(self._arguments, caches) as worker:
                    cold.append(worker.ready())
        measured: list[Figure] = []
        for number in range(self._plan.starts):
            self._say(f"start {number + 1} of {self._plan.starts}")
            with WorkerProcess(self._arguments) as worker:
                warm.append(worker.ready())
                loads.append(worker.load_seconds)
                if number == self._plan.starts - 1:
                    measured = self._measure(worker)
                exits.append(self._exit(worker))
        return [
            *measured,
            Figure("W-1620", "process start to ready, nothing compiled", "s", cold, 60, "max", note=self._cold_note()),
            Figure("W-1620", "process start to ready", "s", warm, 10, "max", note="aim 3 s for the 0.5B shape"),
            Figure("W-1830", "load of the model, by the log", "s", loads),
            Figure(
                "W-1630",
                "SIGTERM to exit, with streams running",
                "s",
                exits,
                5,
                "max",
                note=f"{self._plan.exit_streams} of them, which have 2.5 s to end by themselves (--shutdown-grace-sec)",
            ),
        ]

    def _cold_note(self) -> str:
        return "caches of kernels empty" if self._compiles else "the CPU compiles nothing: see the next line"

    def _measure(self, worker: WorkerProcess) -> list[Figure]:
        with Client(worker.url) as client:
            self.facts["health"] = client.health()
            context = int(self.facts["health"]["context_length"])
            parts: list[tuple[str, Callable[[], list[Figure]]]] = [
                ("first token", lambda: self._first_token(client, context)),
                ("between tokens", lambda: self._between_tokens(client)),
                ("parse and validation", lambda: self._parse(client)),
                ("cancel while it decodes", lambda: self._ended_early(client, "cancel", False)),
                ("cancel in the prompt", lambda: self._ended_early(client, "cancel", True, context)),
                ("disconnect", lambda: self._ended_early(client, "disconnect", False)),
                ("leaks", lambda: self._leaks(worker, client, context)),
                ("load", lambda: self._load(worker)),
            ]
            figures: list[Figure] = []
            for what, measure in parts:
                start = time.perf_counter()
                figures += measure()
                _settle(client)
                self._say(f"{what}: {time.perf_counter() - start:.1f} s")
            return figures

    def _rounds(self, count: int) -> Iterator[int]:
        """The numbers 0, 1, … of a measurement's rounds, until there are `count` or the time is over."""
        start = time.perf_counter()
        for number in range(count):
            if number >= min(ENOUGH, count) and time.perf_counter() - start > self._plan.budget_s:
                return
            yield number

    def _first_token(self, client: Client, context: int) -> list[Figure]:
        n_tokens = min(PROMPT_TOKENS, context - 1)
        ours, theirs, lengths, reused = [], [], set(), 0
        for number in self._rounds(self._plan.first_tokens + 1):
            prompt, _ = prompt_of(client, n_tokens, number)
            start = time.perf_counter()
            with client.execute(prompt, max_tokens=1, temperature=0) as stream:
                for event in stream:
                    if isinstance(event, Token) and number:  # the first round warms up
                        ours.append(1000 * (time.perf_counter() - start))
                    elif isinstance(event, End):
                        lengths.add(event.tokens_in)
                        reused += event.prefix_tokens_reused
                        if number and event.first_token_ms is not None:
                            theirs.append(event.first_token_ms)
        note = "the target is for a GPU; " if self.facts["health"]["device"] == "cpu" else ""
        note += f"prompts of {_range(lengths)} tokens, one at a time, {reused} tokens found in the prefix cache"
        if n_tokens < PROMPT_TOKENS:
            note += f"; the model's context of {context} has no room for {PROMPT_TOKENS}"
        return [
            Figure("W-1600", "first token, by the worker's clock", "ms", theirs, 100, note=f"from accept; {note}"),
            Figure("W-1600", "first token, by the client's clock", "ms", ours, 100, note="request sent to event read"),
        ]

    def _between_tokens(self, client: Client) -> list[Figure]:
        gaps: list[float] = []
        means = []
        prompts = topics()
        for number in self._rounds(10 * self._plan.gaps):
            last: float | None = None
            with client.execute(prompts[number % len(prompts)], seed=number, max_tokens=128) as stream:
                for event in stream:
                    if isinstance(event, Token):
                        now = time.perf_counter()
                        if last is not None:
                            gaps.append(1000 * (now - last))
                        last = now
                    elif isinstance(event, End) and event.tokens_out > 1:
                        means.append(event.decode_time_ms / (event.tokens_out - 1))
            if len(gaps) >= self._plan.gaps:
                break
        return [
            Figure("W-1602", "between tokens, by the client's clock", "ms", gaps, 10, note="one stream"),
            Figure(
                "W-1602",
                "between tokens, by the worker's clock",
                "ms",
                means,
                10,
                note="mean of each answer: decode_time_ms over tokens",
            ),
        ]

    def _parse(self, client: Client) -> list[Figure]:
        """Measure the worker's parser in this process, and over HTTP with a body that is read and then refused."""
        words = random.Random(0).choices(["word", "Łódź", "雨", "tokens"], k=MAX_PROMPT_CHARS)
        prompt = " ".join(words)[:MAX_PROMPT_CHARS]
        body: dict[str, Any] = {
            **{"job_id": "x" * 64, "prompt": prompt, "max_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
            **{"min_p": 0.05, "repetition_penalty": 1.1, "stop": ["a", "b", "c", "d"], "seed": 1, "logprobs": 5},
        }
        content = json.dumps(body).encode()
        here, refused, health = [], [], []
        for _ in range(self._plan.parses):
            start = time.perf_counter()
            parse(ExecuteRequest, content).sampling(MAX_TOKENS)
            here.append(1000 * (time.perf_counter() - start))
        for number in range(self._plan.cancels):
            start = time.perf_counter()
            with contextlib.suppress(WorkerError):
                list(client.execute(prompt, seed=-1, job_id=f"refused-{number}"))
            refused.append(1000 * (time.perf_counter() - start))
            start = time.perf_counter()
            client.health()
            health.append(1000 * (time.perf_counter() - start))
        return [
            Figure(
                "W-1603",
                "parse and validation",
                "ms",
                here,
                1,
                note=f"the worker's function in the benchmark's process, {len(content)} bytes with all fields; "
                "the prompt is tokenised later, in another thread",
            ),
            Figure(
                "W-1603", "round trip of such a body, refused", "ms", refused, note="with HTTP and the client's work"
            ),
            Figure("W-1604", "round trip of /health, no load", "ms", health, note="by the same client"),
        ]

    def _ended_early(self, client: Client, how: str, in_prompt: bool, context: int = 0) -> list[Figure]:
        """Measure the time from a cancellation or disconnect to the last event, and until no block is used."""
        heard, free, dropped = [], [], 0
        for number in self._rounds(self._plan.cancels):
            if in_prompt:
                prompt, _ = prompt_of(client, min(PROMPT_TOKENS, context - 1), 1000 + number)
            else:
                prompt = topics()[number % len(topics())]
            _settle(client)
            stream = client.execute(prompt, temperature=LONG_TEMPERATURE, max_tokens=MAX_TOKENS, seed=number)
            try:
                for _ in range(1 if in_prompt else 5):
                    next(stream)
                outcome = self._cancel(client, stream, in_prompt) if how == "cancel" else self._leave(client, stream)
            except StopIteration:
                outcome = None
            if outcome is None:
                dropped += 1
                continue
            if outcome[0] is not None:
                heard.append(outcome[0])
            free.append(outcome[1])
        where = "in its prompt" if in_prompt else "while it decodes"
        note = f"{dropped} more are left out: the answer had ended by itself" if dropped else ""
        polled = "until /metrics says that no block is used, asked without a pause"
        if in_prompt:  # a step may last, and /metrics tells of the time before it
            polled = "until the engine takes another request, which it does when the first has no blocks any more"
        if how == "cancel":
            return [
                Figure("W-1610", f"cancel {where}, to the last event", "ms", heard, 100, note=note),
                Figure("W-1610", f"cancel {where}, to free blocks", "ms", free, 100, note=polled),
            ]
        return [Figure("W-1611", f"disconnect {where}, to free blocks", "ms", free, 100, note=polled)]

    @staticmethod
    def _cancel(client: Client, stream: Stream[Event], in_prompt: bool) -> tuple[float | None, float] | None:
        """Milliseconds until the stream's error, and until the blocks are free; None if the job ended before."""
        seen: list[float] = []

        def drain() -> bool:
            try:
                for _ in stream:
                    pass
            except WorkerError as e:
                seen.append(time.perf_counter())
                return e.code == "CANCELLED"
            return False

        with ThreadPoolExecutor(1) as pool:
            draining = pool.submit(drain)
            start = time.perf_counter()
            client.cancel(str(stream.job_id))
            free = _until_taken(client) if in_prompt else _until_free(client)
            cut = draining.result()
        return (1000 * (seen[0] - start), 1000 * (free - start)) if cut else None

    @staticmethod
    def _leave(client: Client, stream: Stream[Event]) -> tuple[float | None, float] | None:
        if metric(client.metrics(), "worker_batch_size") == 0:
            return None
        start = time.perf_counter()
        stream.close()
        return None, 1000 * (_until_free(client) - start)

    def _leaks(self, worker: WorkerProcess, client: Client, context: int) -> list[Figure]:
        """Compare device memory, blocks and resident memory before and after requests of all kinds."""
        prompts = topics()

        def requests(first: int, n: int) -> None:
            for number in range(first, first + n):
                options: Any = {"seed": number, "max_tokens": 32, "temperature": 1.0, "logprobs": number % 3}
                prompt = prompts[number % len(prompts)]
                if number % 10 == 7:
                    prompt, _ = prompt_of(client, min(256, context // 2), 2000 + number)
                stream = client.execute(prompt, **options)
                if number % 5 == 3:  # closed during the stream
                    next(stream)
                    stream.close()
                elif number % 5 == 4:  # cancelled
                    next(stream)
                    client.cancel(str(stream.job_id))
                    with contextlib.suppress(WorkerError):
                        list(stream)
                else:
                    list(stream)

        requests(0, min(20, self._plan.leak_requests))  # some buffers grow once
        _settle(client)
        before, rss = _memory(client), worker.rss()
        requests(1000, self._plan.leak_requests)
        _settle(client)
        after, rss_after = _memory(client), worker.rss()
        self.facts["memory_before"], self.facts["memory_after"] = before, after
        vram = [float(after["vram"].get(purpose, 0) - n) for purpose, n in before["vram"].items()]
        n = self._plan.leak_requests
        note = ", ".join(f"{k} {v}" for k, v in after["vram"].items()) or "this device has none: nothing to compare"
        blocks = float(after["blocks"] - before["blocks"])
        return [
            Figure("W-1830", f"device memory after {n} requests, by purpose", "B", vram, 0, "max", True, note),
            Figure("W-1830", f"KV blocks in all after {n} requests", "", [blocks], 0, "max", True, "difference"),
            Figure("W-1830", "KV blocks in use afterwards", "", [after["used"]], 0, "max", True),
            Figure(
                "W-1830",
                f"resident memory after {n} requests",
                "MiB",
                [(rss_after - rss) / MIB],
                note=f"difference; {rss_after / MIB:.1f} MiB in all",
            ),
        ]

    def _load(self, worker: WorkerProcess) -> list[Figure]:
        plan = self._plan
        figures, self.facts["load"] = run_load(worker, plan.load_clients, plan.load_s, self._say, n_seeds=2)
        return figures

    def _exit(self, worker: WorkerProcess) -> float:
        """Seconds from SIGTERM to the end of the process, while streams run."""
        begun = threading.Semaphore(0)

        def stream(seed: int) -> None:
            with contextlib.suppress(ClientError), Client(worker.url) as client:
                while True:  # starts another stream when one ends by itself
                    for event in client.execute(topics()[0], temperature=LONG_TEMPERATURE, seed=seed):
                        if isinstance(event, Started):
                            begun.release()

        threads = [threading.Thread(target=stream, args=(i,), daemon=True) for i in range(self._plan.exit_streams)]
        for thread in threads:
            thread.start()
        for _ in threads:
            begun.acquire(timeout=10)
        seconds, code = worker.terminate()
        for thread in threads:
            thread.join(10)
        if code != 0:
            self._say(f"the worker ended with code {code}, not 0")
        return seconds


def _until_free(client: Client, pause_s: float = 0.0) -> float:
    """Wait until no block is in use; returns the time. Raises ClientError after SETTLE_S seconds."""
    end = time.perf_counter() + SETTLE_S
    while metric(client.metrics(), "worker_kv_blocks", state="used") > 0:
        if time.perf_counter() > end:
            raise ClientError(f"blocks are still in use {SETTLE_S:g} s after the last request")
        if pause_s:
            time.sleep(pause_s)
    return time.perf_counter()


def _until_taken(client: Client) -> float:
    """Wait until the engine has accepted another request, after finishing all earlier commands; returns the time."""
    with client.execute("a", max_tokens=1) as stream:
        next(stream)
        return time.perf_counter()


def _settle(client: Client) -> None:
    """Wait until nothing runs, without measuring the time."""
    _until_free(client, 0.01)


def _memory(client: Client) -> dict[str, Any]:
    text = client.metrics()
    by_state = {state: metric(text, "worker_kv_blocks", state=state) for state in ("used", "cached", "free")}
    return {
        "vram": client.health()["vram_bytes"],
        "used": by_state["used"],
        "by_state": by_state,
        "blocks": sum(by_state.values()),
    }


def _range(numbers: set[int]) -> str:
    return "no" if not numbers else str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
