"""Sends thousands of invalid and unusual requests to a worker, and checks that it still works correctly afterwards.

python -m tools.fuzz_worker --requests 10000

Half of them are bodies that schemathesis makes from the worker's OpenAPI document, valid and invalid ones; the other
half are those of `fuzz_raw.py` on bare sockets. Several clients send at once; another one requests the worker's health.

These are failures: a status 500; an invalid response (JSON that does not parse, a stream without exactly one last
event); an accepted body that violates its schema; an unexpected error in the log; a request or a health check that
takes too long; and, afterwards, blocks, sequences, sockets, files or memory that are not freed, a haiku that differs,
or an exit code other than 0. With a failure, the exit code is 1. A summary is printed to stdout as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from tqdm import tqdm

from tools.fuzz_process import ANSWER_WITHIN_S, WorkerUnderTest, worker_under_test
from tools.fuzz_raw import BODIES, raw_case

HAIKU = {
    "job_id": "haiku",
    "prompt": "Write a haiku about GPU computing",
    "max_tokens": 50,
    "temperature": 0.7,
    "seed": 42,
}
LEFT_OUT = {"/shutdown"}
ALLOWED = {100, 200, 202, 400, 403, 404, 405, 408, 409, 413, 414, 421, 431, 499, 501, 503, 504, 505}
FEW_TOKENS = 6  # maximum tokens of most answers; one request in twenty may have more
HEALTH_WITHIN_S = 5.0
GIVEN_BACK_WITHIN_S = 20.0  # the worker closes idle connections after 10 s
PARTS = 10  # of a run; memory is measured after each
MAX_GROWTH = 8 << 20  # bytes of resident memory in the second half: the first fills caches
MAX_FINDINGS = 50


@dataclass
class Report:
    """Counts of requests and responses, and the failures found. Any thread may add to it."""

    statuses: Counter[str] = field(default_factory=Counter)  # of the bodies, by route and mode
    raw: Counter[str] = field(default_factory=Counter)  # by kind
    raw_statuses: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    n_findings: int = 0
    slowest_s: float = 0.0
    health_s: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self, what: str) -> None:
        with self._lock:
            self.n_findings += 1
            if len(self.findings) < MAX_FINDINGS:
                self.findings.append(what[:1000])

    def count(self, counter: Counter[str], key: str) -> None:
        with self._lock:
            counter[key] += 1

    def took(self, seconds: float) -> None:
        with self._lock:
            self.slowest_s = max(self.slowest_s, seconds)


class Fuzz:
    """One run with one worker."""

    def __init__(
        self, worker: WorkerUnderTest, n_requests: int, seed: int, n_threads: int, by_schema: float, shown: bool
    ) -> None:
        self._worker, self._n, self._seed, self._by_schema = worker, n_requests, seed, by_schema
        self._pool = ThreadPoolExecutor(n_threads, "client")
        self._room = threading.Semaphore(2 * n_threads)
        self._client = httpx.Client(base_url=worker.url, timeout=ANSWER_WITHIN_S)
        self._random = random.Random(seed)
        self._bar = tqdm(total=n_requests, disable=not shown, file=sys.stderr)
        self._done = threading.Event()
        self.report = Report()

    def run(self) -> dict[str, Any]:
        worker, report = self._worker, self.report
        haiku = self._haiku()
        document = self._client.get("/openapi.json").json()
        for path in document["paths"]:  # whatever is started by a first request
            if path not in LEFT_OUT:
                self._known(path)
        self._idle()
        descriptors, threads = worker.n_descriptors(), worker.n_threads()
        start = time.monotonic()
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        rss = []  # after each part
        for part in range(PARTS):
            self._send(document, self._n * (part + 1) // PARTS - self._n * part // PARTS, part)
            self._idle()
            rss.append(worker.rss())
        self._pool.shutdown()
        seconds = time.monotonic() - start
        self._done.set()
        watch.join()
        self._bar.close()
        self._idle()
        self._client.close()
        self._given_back("file descriptors", lambda: worker.n_descriptors() <= descriptors, worker.n_descriptors)
        self._given_back("threads", lambda: worker.n_threads() <= threads, worker.n_threads)
        grown = rss[-1] - rss[PARTS // 2]
        if grown > MAX_GROWTH:
            report.found(f"resident memory grew by {grown} bytes: {rss}")
        self._client = httpx.Client(base_url=worker.url, timeout=ANSWER_WITHIN_S)
        if self._haiku() != haiku:
            report.found("the haiku is another one")
        health = self._client.get("/health").json()
        if health["status"] != "healthy":
            report.found(f"unhealthy: {health['reasons']}")
        self._client.close()
        errors = worker.metric("worker_requests_total", outcome="error")
        if errors:
            report.found(f"{errors:g} requests ended with an error of the worker's")
        for line in worker.unexpected():
            report.found(f"in the log: {line}")
        final_descriptors = worker.n_descriptors()
        code = worker.end()
        if code != 0:
            report.found(f"exit code {code}")
        ordered = sorted(report.health_s) or [0.0]
        return {
            "requests": self._n,
            "seed": self._seed,
            "seconds": round(seconds, 1),
            "schema": dict(sorted(report.statuses.items())),
            "raw": dict(sorted(report.raw.items())),
            "raw_statuses": dict(sorted(report.raw_statuses.items())),
            "slowest_answer_s": round(report.slowest_s, 3),
            "health": {
                "asked": len(report.health_s),
                "p50_ms": round(ordered[len(ordered) // 2] * 1000, 2),
                "p99_ms": round(ordered[len(ordered) * 99 // 100] * 1000, 2),
                "max_ms": round(ordered[-1] * 1000, 2),
            },
            "rss_mib": [round(n / (1 << 20), 1) for n in rss],
            "descriptors": {"before": descriptors, "after": final_descriptors},
            "exit_code": code,
            "findings": report.n_findings,
            "first_findings": report.findings,
        }

    def _send(self, document: dict[str, Any], n: int, part: int) -> None:
        """Send n requests, made by schema and raw ones, evenly mixed."""
        n_bodies = round(n * self._by_schema)
        raw = Spread(n - n_bodies, n_bodies, lambda: self._submit(self._raw, self._random.getrandbits(64)))
        for path, mode, body in bodies(document, n_bodies, self._seed * PARTS + part) if n_bodies else ():
            self._submit(self._body, path, mode, self._brief(body))
            raw.step()
        raw.rest()
        for _ in range(self._room_size()):
            self._room.acquire()
        for _ in range(self._room_size()):
            self._room.release()

    def _room_size(self) -> int:
        return 2 * self._pool._max_workers

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._room.acquire()
        future = self._pool.submit(function, *arguments)
        future.add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        self._room.release()
        self._bar.update()
        error = future.exception()
        if error is not None:
            self.report.found(f"the client failed: {type(error).__name__}: {error}")

    def _brief(self, body: Any) -> Any:
        """Limit the length of most answers; other fields are unchanged."""
        if not isinstance(body, dict) or not {"prompt", "messages"} & set(body) or self._random.random() < 0.05:
            return body
        name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        given = body.get(name)
        if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > FEW_TOKENS):
            return {**body, name: FEW_TOKENS} if given is None or given <= 2048 else body
        return body

    def _known(self, path: str) -> None:
        if path in BODIES:
            self._client.post(path, json=BODIES[path])
        else:
            self._client.get(path)

    def _body(self, path: str, mode: str, body: Any) -> None:
        start = time.monotonic()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = self._client.post(path, content=content, headers={"Content-Type": "application/json"})
        self.report.took(time.monotonic() - start)
        self.report.count(self.report.statuses, f"{path} {mode} {response.status_code}")
        about = f"{path} {mode} {response.status_code} {response.text[:300]} for {content[:400]!r}"
        if response.status_code not in ALLOWED:
            self.report.found(about)
        elif problem := _problem(response):
            self.report.found(f"{problem}: {about}")
        elif mode == "invalid" and response.status_code < 300:
            self.report.found(f"taken, though against its schema: {about}")

    def _raw(self, seed: int) -> None:
        kind, answer, seconds = raw_case(self._worker.port, random.Random(seed))
        self.report.count(self.report.raw, kind)
        self.report.took(seconds)
        for status in answer:
            self.report.count(self.report.raw_statuses, str(status))
            if status not in ALLOWED:
                self.report.found(f"raw {kind}, seed {seed}: status {status}")

    def _watch(self) -> None:
        with httpx.Client(base_url=self._worker.url, timeout=HEALTH_WITHIN_S) as client:
            while not self._done.wait(0.1):
                start = time.monotonic()
                try:
                    status = client.get("/health").json()["status"]
                except (httpx.HTTPError, ValueError) as e:
                    self.report.found(f"health: {type(e).__name__}: {e}")
                    continue
                self.report.health_s.append(time.monotonic() - start)
                if status != "healthy":
                    self.report.found(f"health: {status}")

    def _haiku(self) -> str:
        lines = self._client.post("/execute", json=HAIKU).text.splitlines()
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        return "".join(event["t"] for event in data if "t" in event)

    def _idle(self) -> None:
        """Check that no sequence has a block or waits."""

        def idle() -> bool:
            of = self._worker.metric
            return of("worker_kv_blocks", state="used") + of("worker_queue_depth") == 0

        self._given_back("blocks", idle, lambda: self._worker.metric("worker_kv_blocks", state="used"))

    def _given_back(self, what: str, done: Callable[[], bool], left: Callable[[], float]) -> None:
        end = time.monotonic() + GIVEN_BACK_WITHIN_S
        while not done():
            if time.monotonic() > end:
                self.report.found(f"{what} that are not given back: {left():g} are left")
                return
            time.sleep(0.1)


class Spread:
    """Calls a function n times, evenly spread over m steps."""

    def __init__(self, n: int, m: int, function: Callable[[], None]) -> None:
        self._n, self._m, self._function = n, max(m, 1), function
        self._called = self._steps = 0

    def step(self) -> None:
        self._steps += 1
        while self._called < min(self._n, self._steps * self._n // self._m):
            self._called += 1
            self._function()

    def rest(self) -> None:
        for _ in range(self._n - self._called):
            self._function()


def bodies(document: dict[str, Any], n: int, seed: int) -> list[tuple[str, str, Any]]:
    """n shuffled bodies for the POST routes of an OpenAPI document: path, `valid` or `invalid`, and a JSON value."""
    import schemathesis
    from schemathesis import GenerationMode

    modes = {"valid": GenerationMode.POSITIVE, "invalid": GenerationMode.NEGATIVE}
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    wanted = [op for op in operations if op.path not in LEFT_OUT and op.method.upper() == "POST"]
    kinds = [(op, name) for op in wanted for name in modes]
    rng, found = random.Random(seed), []
    rng.shuffle(kinds)  # where n is small, not all have a share
    for number, (operation, name) in enumerate(kinds):
        share = n // len(kinds) + (number < n % len(kinds))
        made: list[Any] = []
        while len(made) < share:
            strategy = operation.as_strategy(generation_mode=modes[name])
            made += _examples(strategy, share - len(made), seed + 1000 * len(made))
        found += [(operation.path, name, case.body) for case in made]
    rng.shuffle(found)
    return found


def _examples(strategy: Any, n: int, seed: int) -> list[Any]:
    """At most n, at least one."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    made: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def make(example: Any) -> None:
        made.append(example)

    make()
    return made[:n]


def _problem(response: httpx.Response) -> str | None:
    """The problem with the form of a response; None if it is valid."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        try:
            value = response.json()
        except ValueError:
            return "no JSON"
        if response.status_code >= 400:
            error = value.get("error", value)
            if not isinstance(error.get("code"), str) or not isinstance(error.get("message"), str):
                return "an error without code or message"
            if error["code"] == "INTERNAL":
                return "an internal error"
        return None
    lines = response.text.splitlines()
    if any(line.startswith("event: ") for line in lines):
        last = [line for line in lines if line in ("event: end", "event: error")]
        return None if len(last) == 1 and lines[-3] == last[0] else "a stream without its one last event"
    return None if lines.count("data: [DONE]") == 1 else "a stream without [DONE]"


def fuzz(
    n_requests: int,
    seed: int = 0,
    *,
    n_threads: int = 4,
    by_schema: float = 0.5,
    arguments: Sequence[str] = ("--device", "cpu"),
    program: Sequence[str] = ("-m", "refengine"),
    shown: bool = False,
) -> dict[str, Any]:
    """Start a worker, send requests, and return the summary. by_schema: the share of bodies made by schemathesis."""
    with worker_under_test(arguments, program) as worker:
        return Fuzz(worker, n_requests, seed, n_threads, by_schema, shown).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the requests")
    parser.add_argument("--threads", type=int, default=4, metavar="N", help="number of parallel clients")
    parser.add_argument(
        "--by-schema", type=float, default=0.5, metavar="X", help="share of bodies by schemathesis, 0 to 1"
    )
    parser.add_argument("arguments", nargs="*", help="arguments of `refengine serve` (default: --device cpu), after --")
    given = parser.parse_args()
    result = fuzz(
        given.requests,
        given.seed,
        n_threads=given.threads,
        by_schema=given.by_schema,
        arguments=given.arguments or ("--device", "cpu"),
        shown=True,
    )
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
