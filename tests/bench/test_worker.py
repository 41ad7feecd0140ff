"""The benchmarks of the worker: every figure comes with its target, and a stream that is not right is found."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from refengine.bench.clients import MAX_TOKENS, TEMPERATURE, Reference, problems_of
from refengine.bench.figures import Figure
from refengine.bench.load import metric, references, run_load, slope
from refengine.bench.probe import Probe
from refengine.bench.process import WorkerProcess, free_port
from refengine.bench.prompts import prompt_of
from refengine.bench.report import commit, machine
from refengine.client.client import Client
from refengine.client.events import ClientError, End, Event, Started, Token
from refengine.errors import RefengineError
from refengine.model import PACKAGED_MODEL
from refengine.worker.options import WorkerOptions
from refengine.worker.server import BLAS_THREADS, _listen
from tests.cli_runner import ENVIRONMENT, ROOT, cli, subprocess_cli
from tests.worker.server import Server, serving

TARGETS = {
    "W-1600": {"first token, by the worker's clock": "p95 < 100", "first token, by the client's clock": "p95 < 100"},
    "W-1602": {
        "between tokens, by the client's clock": "p95 < 10",
        "between tokens, by the worker's clock": "p95 < 10",
    },
    "W-1603": {"parse and validation": "p95 < 1", "round trip of such a body, refused": "-"},
    "W-1604": {
        "/health under load": "p99 < 10",
        "/health that failed": "max = 0",
        "round trip of /health, no load": "-",
    },
    "W-1610": {
        "cancel while it decodes, to the last event": "p95 < 100",
        "cancel while it decodes, to free blocks": "p95 < 100",
        "cancel in its prompt, to the last event": "p95 < 100",
        "cancel in its prompt, to free blocks": "p95 < 100",
    },
    "W-1611": {"disconnect while it decodes, to free blocks": "p95 < 100"},
    "W-1620": {"process start to ready, nothing compiled": "max < 60", "process start to ready": "max < 10"},
    "W-1630": {"SIGTERM to exit, with streams running": "max < 5"},
    "W-1830": {
        "load of the model, by the log": "-",
        "device memory after 10 requests, by purpose": "max = 0",
        "KV blocks in all after 10 requests": "max = 0",
        "KV blocks in use afterwards": "max = 0",
        "resident memory after 10 requests": "-",
    },
    "load": {
        "first token, from request": "-",
        "between tokens, of a stream": "-",
        "streams that are not whole, or not what they are alone": "max = 0",
        "answers of 503": "max = 0",
        "KV blocks in use afterwards": "max = 0",
        "growth of resident memory": "-",
    },
}
NOT_ON_A_CPU = {"process start to ready, nothing compiled", "device memory after 10 requests, by purpose"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_a_quick_run_has_every_figure_beside_its_target(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    result = cli("bench", "worker", "--quick", "--output", output)
    assert result.code == 0, result.err
    record = json.loads(output.read_text())
    figures = {(f["id"], f["name"]): f for f in record["figures"]}
    assert set(figures) == {(i, name) for i, names in TARGETS.items() for name in names}
    for (number, name), figure in figures.items():
        assert (figure["samples"] > 0) == (name not in NOT_ON_A_CPU), name
        target = TARGETS[number][name]
        (row,) = [line for line in result.out.splitlines() if f"│ {number} " in line and f"│ {name} " in line]
        assert f" {target} " in row
        assert row.rstrip(" │").endswith(figure["verdict"])
        if figure["samples"]:
            assert figure["min"] <= figure["p50"] <= figure["p95"] <= figure["p99"] <= figure["max"]
            assert figure["verdict"] in (("pass", "miss") if figure["target"] is not None else ("-",))
        if figure["histogram"]:
            assert sum(n for _, _, n in figure["histogram"]) == figure["samples"]
    wrong = [f for f in record["figures"] if f["judged"] == "max" and f["target"] == 0 and f["verdict"] == "miss"]
    assert wrong == [], "counts of what must not be are no speeds"
    assert {"date", "machine", "commit", "version", "command", "health", "load"} <= set(record)
    assert record["health"]["model"] == "refengine haiku"
    assert "prompts of 511 tokens" in figures["W-1600", "first token, by the worker's clock"]["note"]
    assert "has no room for 512" in figures["W-1600", "first token, by the worker's clock"]["note"]
    assert re.search(r"refengine: \d+ targets missed", result.err)


@pytest.mark.parametrize("what", ["worker", "load"])
def test_help(what: str) -> None:
    text = cli("bench", what, "--help").out
    assert all(word in text for word in ("--model", "--gpu-device", "--output", "--strict", "--serve"))
    assert what in cli("bench", "--help").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load", "--clients", "0"], "--clients 0"),
        (["load", "--seconds", "nan"], "--seconds nan"),
        (["load", "--device", "cpu", "--gpu-device", "0"], "given both"),
        (["worker", "--output", "figures.txt"], "must end in .json"),
        (["load", "--model", "/nowhere.gguf"], "the worker did not start: /nowhere.gguf"),
        (["load", "--serve=--max-batch 0"], "the worker did not start: "),
    ],
)
def test_unusable_arguments(arguments: list[str], message: str) -> None:
    result = cli("bench", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[-1]


def test_a_load_run(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    result = subprocess_cli("bench", "load", "--clients", 6, "--seconds", 2, "--output", output)
    assert result.code == 0, result.err
    record = json.loads(output.read_text())
    load = record["load"]
    assert load["streams"] >= 6
    assert (load["problems"], load["errors"]) == ([], {})
    assert load["rss_bytes"]
    assert {f["name"]: f["verdict"] for f in record["figures"]}["answers of 503"] == "pass"


def test_a_queue_that_is_too_small_is_counted_and_nothing_is_lost(tmp_path: Path) -> None:
    with WorkerProcess(["--device", "cpu", "--max-batch", "1", "--max-queue", "1"]) as worker:
        worker.ready()
        # Sixteen at once for two places: some are refused however slowly a busy machine starts them.
        figures, load = run_load(worker, 16, 2.0, lambda _: None, n_seeds=1)
    refused = {figure.name: figure for figure in figures}["answers of 503"]
    assert refused.verdict == "miss"
    assert refused.samples[0] > 0
    assert load["problems"] == []


# ---- the checker of streams ------------------------------------------------------------------------------------------

KNOWN = [
    Reference("one", 1, "first answer", 2, "eos"),
    Reference("one", 2, "second answer", 2, "eos"),
    Reference("two", 1, "third answer", 2, "length"),
]


def stream(*texts: str, job_id: str = "j", seed: int = 1, stop_reason: str = "eos") -> list[Event]:
    tokens = [Token(text, i) for i, text in enumerate(texts)]
    return [Started(job_id, "m", "now", seed, 0), *tokens, End(len(texts), 1.0, stop_reason, 1.0, 3, 0)]


RIGHT = stream("first", " answer")


def test_a_right_stream_has_no_problems() -> None:
    assert problems_of(RIGHT, "j", KNOWN[0], KNOWN) == []


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (stream("second", " answer"), "it is the answer to 'one', seed 2"),
        (stream("first", " ans"), "given 'first ans'"),
        (stream("first", "third answer"), "differs from character 5"),
        (stream("first", " answer", " answer"), "differs from character 12"),
        (stream("first answer"), "ends with"),
        (stream("first", " answer", stop_reason="length"), "ends with"),
        (stream("first", " answer", seed=2), "started says j, 2"),
        (stream("first", " answer", job_id="other"), "started says other, 1"),
        ([], "does not begin with started"),
        (RIGHT[1:], "does not begin with started"),
        ([RIGHT[0], *RIGHT], "started more than once"),
        (RIGHT[:-1], "0 ends"),
        ([*RIGHT, RIGHT[-1]], "2 ends"),
        ([*RIGHT, RIGHT[1]], "something after it"),
        ([RIGHT[0], RIGHT[2], RIGHT[1], RIGHT[3]], "not numbered"),
    ],
)
def test_a_planted_fault_is_found(events: Sequence[Event], message: str) -> None:
    assert message in " / ".join(problems_of(events, "j", KNOWN[0], KNOWN))


def test_references_are_what_the_worker_says_again(server: Server) -> None:
    with Client(server.url) as client:
        (known,) = references(client, ["Write a haiku about the moon"], 1)
        options: Any = {"seed": 0, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
        events = list(client.execute(known.prompt, job_id="again", **options))
        other = list(client.execute(known.prompt, job_id="again", **{**options, "temperature": 2.0}))
    assert problems_of(events, "again", known, [known]) == []
    assert problems_of(other, "again", known, [known]) != []


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_percentiles_are_samples() -> None:
    figure = Figure("x", "x", "ms", [float(i) for i in range(100, 0, -1)], 95)
    assert [figure.at(p) for p in ("p50", "p95", "p99", "max")] == [50, 95, 99, 100]
    assert figure.verdict == "miss"
    assert Figure("x", "x", "ms", [1.0], 1, "max").verdict == "miss"
    assert Figure("x", "x", "ms", [1.0], 1, "max", inclusive=True).verdict == "pass"
    assert Figure("x", "x", "ms", [], 1).verdict == "-"
    assert Figure("x", "x", "ms", [1.0]).verdict == "-"


@pytest.mark.parametrize(
    "samples", [[1.0, 2.0, 3.0], [0.001, 1.0, 1000.0, 1000.0], [0.0, 5.0], [-1.0, 1.0], [3.0, 3.0], []]
)
def test_histograms_hold_every_sample(samples: list[float]) -> None:
    figure = Figure("x", "x", "ms", samples)
    assert sum(n for _, _, n in figure.histogram()) in (len(samples), 0)
    assert bool(figure.histogram()) == (len(set(samples)) > 1)
    assert len(figure.bars()) == len(figure.histogram())


@pytest.mark.parametrize("n_tokens", [1, 64, 300])
def test_prompts_have_the_length_that_was_asked_for(server: Server, n_tokens: int) -> None:
    with Client(server.url) as client:
        for variant in range(3):
            text, found = prompt_of(client, n_tokens, variant)
            assert found == n_tokens
            assert client.generate(text, max_tokens=1).end.tokens_in == n_tokens


def test_metrics_are_read() -> None:
    text = '# HELP a x\na{k="1",q="z"} 2.0\na{k="2",q="z"} 3.0\nab 9\nb 4\n'
    assert (metric(text, "a"), metric(text, "a", k="2"), metric(text, "b")) == (5, 3, 4)
    with pytest.raises(ClientError, match="no metric c"):
        metric(text, "c")


def test_slope() -> None:
    assert slope([(0.0, 5), (1.0, 7), (2.0, 9)]) == pytest.approx(2)
    assert slope([(0.0, 5)]) == 0


def test_probe_counts_what_fails(server: Server) -> None:
    with Probe(server.url) as probe:
        took, failed = probe.finish()
    assert failed == 0
    assert all(ms > 0 for ms in took)
    with Probe(f"http://127.0.0.1:{free_port()}") as gone:
        time.sleep(0.5)
        took, failed = gone.finish()
    assert took == []
    assert failed > 0


def test_a_worker_that_does_not_start_says_why() -> None:
    with (
        WorkerProcess(["--device", "cpu", "--model", "/nowhere.gguf"]) as worker,
        pytest.raises(RefengineError, match="did not start: /nowhere"),
    ):
        worker.ready()


def test_where_it_was_measured() -> None:
    assert "cores" in machine("cpu")["machine"]
    assert "card" in machine("cuda:0")
    assert commit() is None or re.fullmatch(r"[0-9a-f]{7,}\+?", commit() or "")


def test_what_the_worker_sends_is_not_held_back() -> None:
    """Nagle's algorithm is off on its connections: it waited 40 ms between the head of an answer and its body."""
    options = WorkerOptions(str(uuid.uuid4()), PACKAGED_MODEL, "cpu", free_port())

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=_listen(options)):
            _, writer = await asyncio.open_connection(options.host, options.port)
            writer.close()
            return await found

    assert asyncio.run(accepted()) != 0


@pytest.mark.parametrize("said", [None, "7"])
def test_the_event_loop_has_a_core_unless_the_user_says_how_many_threads_multiply(said: str | None) -> None:
    script = """
import os
from threadpoolctl import threadpool_info
from refengine.worker.server import _leave_a_core
_leave_a_core()
print([p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"], len(os.sched_getaffinity(0)))
"""
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in BLAS_THREADS}
    before = {} if said is None else {"OPENBLAS_NUM_THREADS": said}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment | before, capture_output=True, text=True, check=True)
    threads, cores = done.stdout.strip("[\n").split("] ")
    expected = max(1, int(cores) - 1) if said is None else min(7, int(cores))
    assert {int(n) for n in threads.split(",") if n} <= {expected}
