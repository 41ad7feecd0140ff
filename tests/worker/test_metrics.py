"""What /metrics counts: every request once, by how it ended; tokens, times, blocks; all as the client's events say."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from refengine.bench.load import metric
from refengine.cache.paged import BLOCK_SIZE, KVCache
from refengine.engine.engine import DEFAULT_CACHE_TOKENS
from refengine.worker.telemetry.metrics import OUTCOMES
from tests.worker.server import FAULTY, HAIKU, Server, read, serving, text_of, until, write_talker

LONG = {"prompt": "go on", "seed": 5}
SHORT = {**LONG, "max_tokens": 5}
SLOW_STEP_MS = 30  # FAULTY's
TOKENS, PROMPT_TOKENS = "worker_tokens_generated_total", "worker_prompt_tokens_total"
DURATION, FIRST, BETWEEN = "worker_inference_duration_ms", "worker_first_token_ms", "worker_inter_token_ms"
HITS, MISSES = "worker_prefix_cache_hits_total", "worker_prefix_cache_misses_total"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flag") / "fail"


@pytest.fixture(scope="module")
def server(talker: Path, flag: Path) -> Iterator[Server]:
    """One request runs, one waits."""
    options = ("--model", talker, "--max-batch", 1, "--max-queue", 1, "--max-tokens-out", 1000)
    with serving(*options, script=(FAULTY, flag)) as running:
        yield running


@pytest.fixture
def slowly(flag: Path) -> Iterator[None]:
    flag.write_text("slow")
    yield
    flag.unlink(missing_ok=True)


class Change:
    """How metrics change between two looks at them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._after = server.metrics()

    def look_again(self) -> None:
        """Once the engine is done with everything."""
        self._server.settled()
        self._after = self._server.metrics()

    def __call__(self, name: str, **labels: str) -> float:
        return metric(self._after, name, **labels) - metric(self._before, name, **labels)

    def outcomes(self) -> dict[str, float]:
        """Those that were counted."""
        found = {outcome: self("worker_requests_total", outcome=outcome) for outcome in OUTCOMES}
        assert sum(found.values()) == self("worker_requests_total")
        return {outcome: n for outcome, n in found.items() if n}


@contextmanager
def changing(server: Server, **outcomes: int) -> Iterator[Change]:
    """What is done inside ends in these ways, so many times, and in no other."""
    change = Change(server)
    yield change
    change.look_again()
    assert change.outcomes() == outcomes


def test_an_end_of_the_model_is_counted_once() -> None:
    with serving() as haiku, changing(haiku, eos=1):
        assert haiku.run(**HAIKU)[-1][1]["stop_reason"] == "eos"


def test_stop_and_length_are_counted_once(server: Server) -> None:
    with changing(server, length=1) as change:
        text = text_of(server.run(**{**LONG, "max_tokens": 20}))
    assert (change(TOKENS), change(DURATION + "_count")) == (20, 1)
    with changing(server, stop=1):
        end = server.run(**LONG, stop=[text[5:8]])[-1][1]
    assert end["stop_reason"] == "stop"


@pytest.mark.usefixtures("slowly")
def test_cancels_are_counted_once_however_often_they_are_asked_for(server: Server) -> None:
    with changing(server, cancelled=2) as change:
        with server.client() as client, server.stream(client, **LONG, job_id="runs") as runs:
            read(runs, 3)
            with server.client() as other, server.stream(other, **LONG, job_id="waits") as waits:
                read(waits, 1)
                for _ in range(2):
                    server.cancel("waits")
                assert list(waits)[-1][1]["code"] == "CANCELLED"
            server.cancel("runs")
            n_more = len(list(runs))
        server.cancel("runs")
    assert change(TOKENS) >= 2 + n_more - 1  # whatever was drawn, also after the last that was sent
    tokens_in = server.events("execute_end")[-1]["tokens_in"]
    assert change(PROMPT_TOKENS) == 2 * tokens_in
    assert (change(DURATION + "_count"), change(FIRST + "_count")) == (2, 1)  # one never had a token
    assert change(BETWEEN + "_count") == change(TOKENS) - 1


@pytest.mark.usefixtures("slowly")
def test_disconnects_are_counted_once(server: Server) -> None:
    with changing(server, disconnected=1) as change:
        with server.client() as client, server.stream(client, **LONG, job_id="gone") as events:
            read(events, 2)
        assert server.outcome_of("gone") == "disconnected"
        server.cancel("gone")
    assert (change(DURATION + "_count"), change(FIRST + "_count")) == (1, 1)


@pytest.mark.usefixtures("slowly")
def test_deadlines_are_counted_once(server: Server) -> None:
    with (
        changing(server, timeout=1) as change,
        server.client() as client,
        server.stream(client, {"X-Deadline": "1.5"}, **LONG) as events,
    ):
        assert list(events)[-1][1]["code"] == "INFERENCE_TIMEOUT"
    assert change(DURATION + "_count") == 1
    assert change(DURATION + "_sum") >= 1499


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("kind", ["memory", "device", "bug"])
def test_failures_are_counted_once(server: Server, flag: Path, kind: str) -> None:
    with changing(server, error=1) as change, server.client() as client, server.stream(client, **LONG) as events:
        read(events, 2)
        flag.write_text(kind)
        assert list(events)[-1][0] == "error"
    assert (change(DURATION + "_count"), change(FIRST + "_count")) == (1, 1)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], int]] = {
    "unknown field": ({**SHORT, "job_id": "r", "nothing": 1}, {}, 400),
    "no job_id": (SHORT, {}, 400),
    "over the worker's limit": ({**LONG, "job_id": "r", "max_tokens": 1001}, {}, 400),
    "out of the vocabulary": ({**SHORT, "job_id": "r", "top_k": 1_000_000}, {}, 400),
    "longer than the context": ({**SHORT, "job_id": "r", "prompt": "x y " * 4000}, {}, 400),
    "too late": ({**SHORT, "job_id": "r"}, {"X-Deadline": "0"}, 504),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_counted_once(server: Server, case: str) -> None:
    body, headers, status = REFUSED[case]
    with changing(server, refused=1) as change, server.client() as client:
        assert client.post("/execute", json=body, headers=headers).status_code == status
    assert [change(name) for name in (TOKENS, PROMPT_TOKENS, FIRST + "_count")] == [0, 0, 0]


@pytest.mark.usefixtures("slowly")
def test_who_finds_no_room_is_refused_and_counted_once(server: Server) -> None:
    with changing(server, refused=2, cancelled=1, disconnected=1):
        with server.client() as client, server.stream(client, **LONG, job_id="first") as first:
            read(first, 2)
            with server.client() as other, server.stream(other, **LONG, job_id="second") as second:
                read(second, 1)
                with server.client() as third:
                    for job_id, status in (("first", 409), ("new", 503)):
                        response = third.post("/execute", json={**SHORT, "job_id": job_id})
                        assert response.status_code == status
                server.cancel("second")
                assert list(second)[-1][0] == "error"
        assert server.outcome_of("first") == "disconnected"


@pytest.mark.usefixtures("slowly")
def test_figures_are_what_the_events_say(server: Server) -> None:
    n, prompt = 12, "say what the events say"
    with changing(server, length=1) as change:
        start = time.monotonic()
        events = server.run(prompt=prompt, seed=5, max_tokens=n)
        took_ms = (time.monotonic() - start) * 1000
    end = events[-1][1]
    assert [name for name, _ in events] == ["started", *["token"] * n, "end"]
    assert (change(TOKENS), change(PROMPT_TOKENS)) == (n, end["tokens_in"])
    assert change(FIRST + "_count") == change(DURATION + "_count") == 1
    assert change(FIRST + "_sum") == pytest.approx(end["first_token_ms"], abs=0.01)
    assert change(FIRST + "_sum") >= SLOW_STEP_MS
    assert end["first_token_ms"] + end["decode_time_ms"] - 0.01 <= change(DURATION + "_sum") <= took_ms
    assert change(BETWEEN + "_count") == n - 1
    assert (n - 1) * SLOW_STEP_MS <= change(BETWEEN + "_sum") <= took_ms
    for name, count in ((FIRST, 1), (DURATION, 1), (BETWEEN, n - 1)):
        assert (change(name + "_bucket", le="20.0"), change(name + "_bucket", le="+Inf")) == (0, count)


def blocks_of(server: Server) -> tuple[float, float, float]:
    text = server.metrics()
    used, cached, free = (metric(text, "worker_kv_blocks", state=state) for state in ("used", "cached", "free"))
    return used, cached, free


def test_blocks_and_hits_of_the_prefix_cache(talker: Path, flag: Path) -> None:
    n_blocks = DEFAULT_CACHE_TOKENS // BLOCK_SIZE
    with serving("--model", talker, script=(FAULTY, flag)) as server:
        assert blocks_of(server) == (0, 0, n_blocks)
        prompt = "ab " * 100
        with changing(server, length=1) as change:
            n_in = server.run(prompt=prompt, seed=5, max_tokens=100)[-1][1]["tokens_in"]
        assert n_in > 2 * BLOCK_SIZE
        n_full = (n_in - 1) // BLOCK_SIZE
        assert (change(HITS), change(MISSES)) == (0, n_full)
        n_cached = (n_in + 99) // BLOCK_SIZE  # the last token is not fed
        assert blocks_of(server) == (0, n_cached, n_blocks - n_cached)

        with changing(server, length=1) as change:
            end = server.run(prompt=prompt, seed=5, max_tokens=2)[-1][1]
        assert (change(HITS), change(MISSES)) == (n_full, 0)
        assert end["prefix_tokens_reused"] == n_full * BLOCK_SIZE

        with changing(server, length=1) as change:  # begins alike
            end = server.run(prompt=prompt + "cd " * 100, seed=5, max_tokens=2)[-1][1]
        n_alike = end["prefix_tokens_reused"] // BLOCK_SIZE
        assert n_full - 1 <= n_alike <= n_full
        assert (change(HITS), change(MISSES)) == (n_alike, (end["tokens_in"] - 1) // BLOCK_SIZE - n_alike)

        with changing(server, cancelled=1) as change:
            flag.write_text("slow")
            with server.client() as client, server.stream(client, prompt="ef " * 100, job_id="holds") as events:
                read(events, 2)
                until(lambda: blocks_of(server)[0] > 0)
                used, cached, free = blocks_of(server)
                n_drawn = 1 + len(read(events, 1))
                server.cancel("holds")
                n_drawn += len(list(events))
            flag.unlink()
        assert used + cached + free == n_blocks
        tokens_in = server.events("execute_end")[-1]["tokens_in"]
        assert KVCache.blocks_for(tokens_in) <= used <= KVCache.blocks_for(tokens_in + n_drawn)


def test_a_second_look_changes_nothing(server: Server) -> None:
    server.run(prompt="ab " * 100, seed=5, max_tokens=5)
    server.settled()
    first, second = server.metrics(), server.metrics()

    def without_uptime(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("worker_uptime_seconds")]

    assert without_uptime(first) == without_uptime(second)
    assert metric(first, "worker_uptime_seconds") < metric(second, "worker_uptime_seconds")
