"""How jobs end other than by themselves: cancelled, left, too late, cut by a shutdown, failed; and what waits.

Each with the worker alive, its blocks free and the next request right. The model is a small one that talks for long.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from refengine.bench.process import free_port
from tests.worker.server import FAULTY, Server, read, serving, text_of, until, write_talker

LONG = {"prompt": "go on", "seed": 5, "temperature": 1.0}
SHORT = {**LONG, "max_tokens": 5}
TOO_LATE = "INFERENCE_TIMEOUT"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flag") / "fail"


@pytest.fixture(scope="module")
def server(talker: Path, flag: Path) -> Iterator[Server]:
    """One request runs, two wait."""
    arguments = ("--model", talker, "--max-batch", 1, "--max-queue", 2, "--max-step-tokens", 32)
    with serving(*arguments, script=(FAULTY, flag)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    """What a short request says when nothing disturbs it."""
    return text_of(server.run(**SHORT))


@pytest.fixture(autouse=True)
def _served_afterwards(server: Server, expected: str) -> Iterator[None]:
    yield
    server.settled()
    assert text_of(server.run(**SHORT)) == expected
    assert server.process.poll() is None


def test_cancel_while_it_decodes(server: Server) -> None:
    with server.client() as client, server.stream(client, **LONG, job_id="decoding") as events:
        assert [name for name, _ in read(events, 4)] == ["started", "token", "token", "token"]
        server.cancel("decoding")
        *tokens, (name, data) = list(events)
    assert {name for name, _ in tokens} <= {"token"}
    assert (name, data["code"], data["retriable"]) == ("error", "CANCELLED", False)
    assert server.outcome_of("decoding") == "cancelled"


def test_cancel_while_it_waits(server: Server) -> None:
    with server.client() as client, server.stream(client, **LONG, job_id="runs") as running:
        read(running, 2)
        with server.client() as other, server.stream(other, **LONG, job_id="waits") as waiting:
            (started,) = read(waiting, 1)
            assert started[1]["queue_position"] == 1
            until(lambda: server.metric("worker_queue_depth") == 1)
            assert server.metric("worker_batch_size") == 1
            server.cancel("waits")
            assert [(name, data["code"]) for name, data in waiting] == [("error", "CANCELLED")]
        read(running, 3)  # undisturbed
        server.cancel("runs")


@pytest.fixture
def slowly(flag: Path) -> Iterator[None]:
    """With a step of at most 32 tokens, a prompt of a thousand takes a second."""
    flag.write_text("slow")
    yield
    flag.unlink(missing_ok=True)


@pytest.mark.usefixtures("slowly")
def test_cancel_while_it_reads_the_prompt(server: Server) -> None:
    with server.client() as client, server.stream(client, prompt="ab " * 900, job_id="prefill") as events:
        read(events, 1)
        server.cancel("prefill")
        assert [(name, data["code"]) for name, data in events] == [("error", "CANCELLED")]
    assert server.outcome_of("prefill") == "cancelled"


def test_cancel_is_idempotent_and_knows_no_unknown_ids(server: Server) -> None:
    server.cancel("never there")
    server.run(**SHORT, job_id="done")
    server.cancel("done")
    server.cancel("done")


def test_id_of_a_live_job_is_refused_with_409_and_free_afterwards(server: Server) -> None:
    with server.client() as client, server.stream(client, **LONG, job_id="twin") as events:
        read(events, 2)
        with server.client() as other:
            response = other.post("/execute", json={**SHORT, "job_id": "twin"})
        assert (response.status_code, response.json()["field"]) == (409, "job_id")
        assert response.json()["code"] == "INVALID_REQUEST"
        assert next(events)[0] == "token"
        server.cancel("twin")
        assert list(events)[-1][0] == "error"
    assert server.run(**SHORT, job_id="twin")[-1][0] == "end"


def test_full_queue_gets_503_and_nothing_is_lost(server: Server) -> None:
    bodies = [{**LONG, "max_tokens": 1500, "job_id": f"queued{i}"} for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(server.run, **body) for body in bodies]
        until(lambda: server.metric("worker_batch_size") + server.metric("worker_queue_depth") == 3)
        with server.client() as client:
            response = client.post("/execute", json={**SHORT, "job_id": "one too many"})
        assert response.status_code == 503
        assert response.json()["code"] == "QUEUE_FULL"
        assert int(response.headers["retry-after"]) >= 1
        results = [run.result() for run in runs]
    assert {events[-1][1]["stop_reason"] for events in results} == {"length"}
    assert len({text_of(events) for events in results}) == 1
    assert sorted(events[0][1]["queue_position"] for events in results) == [0, 1, 2]


def test_without_batching_one_runs_and_no_more_wait_than_may(talker: Path, tmp_path: Path) -> None:
    """Whatever --max-batch says."""
    options = ("--model", talker, "--no-batching", "--max-batch", 8, "--max-queue", 2)
    (tmp_path / "flag").write_text("slow")
    with serving(*options, script=(FAULTY, tmp_path / "flag")) as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(server.client()) for _ in range(3)]
            streams = [stack.enter_context(server.stream(client, **LONG)) for client in clients]
            assert [read(events, 1)[0][1]["queue_position"] for events in streams] == [0, 1, 2]
            until(lambda: server.metric("worker_queue_depth") == 2)
            assert server.metric("worker_batch_size") == 1
            body = {**SHORT, "job_id": "one too many"}
            with server.client() as client, client.stream("POST", "/execute", json=body) as response:
                assert response.status_code == 503
                assert b"QUEUE_FULL" in response.read()
        server.settled()
        with server.client() as client:
            for n, status in ((3, 200), (4, 400)):
                body = {"prompt": ["go on"] * n, "max_tokens": 2}
                assert client.post("/v1/completions", json=body).status_code == status


@pytest.mark.parametrize("waits", [False, True], ids=["decoding", "waiting"])
def test_disconnect_ends_the_job(server: Server, waits: bool) -> None:
    job_id = f"left {waits}"
    with server.client() as client, server.stream(client, **LONG, job_id="first") as events:
        read(events, 2)
        if not waits:
            server.cancel("first")
        with server.client() as other, server.stream(other, **LONG, job_id=job_id) as leaving:
            read(leaving, 1 if waits else 3)
        assert server.outcome_of(job_id) == "disconnected"
        server.cancel("first")


@pytest.mark.usefixtures("slowly")
def test_disconnect_while_it_reads_the_prompt(server: Server) -> None:
    with server.client() as client, server.stream(client, prompt="cd " * 900, job_id="left prefill") as events:
        read(events, 1)
    assert server.outcome_of("left prefill") == "disconnected"
    (end,) = [line for line in server.events("execute_end") if line["job_id"] == "left prefill"]
    assert (end["tokens_in"] > 900, end["tokens_out"]) == (True, 0)


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("where", ["waiting", "reading the prompt"])
def test_deadline_passes_before_the_first_token(server: Server, where: str) -> None:
    prompt = "ef " * 900 if where == "reading the prompt" else "go on"
    with server.client() as client, server.stream(client, **LONG, job_id="ahead") as ahead:
        read(ahead, 2)
        if where == "reading the prompt":
            server.cancel("ahead")
        body = {**LONG, "prompt": prompt, "job_id": f"late {where}"}
        with server.client() as other, server.stream(other, {"X-Deadline": "0.6"}, **body) as late:
            assert [(name, data.get("code")) for name, data in late] == [("started", None), ("error", TOO_LATE)]
        server.cancel("ahead")
    assert server.outcome_of(f"late {where}") == "timeout"


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("as_time", [False, True], ids=["seconds", "RFC 3339"])
def test_deadline_is_enforced(server: Server, as_time: bool) -> None:
    moment = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
    headers = {"X-Deadline": moment if as_time else "1.5"}
    start = time.monotonic()
    with server.client() as client, server.stream(client, headers, **LONG, job_id=f"late {as_time}") as events:
        name, data = list(events)[-1]
    assert (name, data["code"], data["retriable"]) == ("error", "INFERENCE_TIMEOUT", True)
    assert time.monotonic() - start < 5
    assert server.outcome_of(f"late {as_time}") == "timeout"
    (line,) = [e for e in server.events("execute_start") if e["job_id"] == f"late {as_time}"]
    assert 0.1 < line["deadline_sec"] <= 1.5


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize(("kind", "code"), [("memory", "VRAM_OOM"), ("device", "INTERNAL"), ("bug", "INTERNAL")])
def test_step_that_fails_ends_its_requests_only(server: Server, flag: Path, kind: str, code: str) -> None:
    """On the CPU nothing can be a CUDA error, so that the device's failure is an internal one here."""
    with server.client() as client, server.stream(client, **LONG) as events:
        read(events, 3)
        flag.write_text(kind)
        name, data = list(events)[-1]
    assert (name, data["code"]) == ("error", code)
    assert "secret" not in server.log_file.read_text() + str(data)
    assert server.events("error")[-1]["where"]


def test_health_answers_while_it_decodes(server: Server) -> None:
    with server.client() as client, server.stream(client, **LONG, job_id="busy") as events:
        read(events, 2)
        with server.client() as other:
            answers = [other.get("/health").json()["status"] for _ in range(20)]
        assert set(answers) == {"healthy"}
        server.cancel("busy")


def test_silent_and_broken_clients_harm_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    silent = socket.create_connection((host, int(port)))
    half = socket.create_connection((host, int(port)))
    half.sendall(b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    garbage = socket.create_connection((host, int(port)))
    garbage.sendall(b"\x16\x03\x01\x00\xff garbage\r\n\r\n")
    assert b" 400 " in garbage.recv(1000)
    assert server.run(**SHORT)[-1][0] == "end"
    for connection in (silent, half, garbage):
        connection.close()


def test_cache_exhausted_by_running_requests(talker: Path) -> None:
    """64 tokens of this model's cache take 64 KiB; in 1 MiB the two cannot both become as long as they want."""
    arguments = ["--model", talker, "--kv-cache-size-mb", 1, "--max-batch", 4]
    with serving(*arguments, "--on-shortage", "fail") as small, ThreadPoolExecutor(4) as pool:
        n_blocks = int(small.metric("worker_kv_blocks"))
        body = {**LONG, "max_tokens": n_blocks * 64 - 64}
        runs = [pool.submit(small.run, **{**body, "seed": seed}) for seed in range(4)]
        last = [run.result()[-1] for run in runs]
        failed = [data for name, data in last if name == "error"]
        assert failed
        assert {data["code"] for data in failed} == {"VRAM_OOM"}
        assert all(data["retriable"] for data in failed)
        assert small.run(**SHORT)[-1][0] == "end"
        small.settled()
        with small.client() as client:
            response = client.post("/execute", json={**LONG, "job_id": "never fits", "prompt": "ab " * 1300})
        assert response.status_code == 400
        assert "KV cache has" in response.json()["message"]


def ending(server: Server, how: str) -> None:
    if how == "shutdown":
        with server.client() as client:
            assert client.post("/shutdown").status_code == 202
    else:
        server.process.send_signal(getattr(signal, how))


@pytest.mark.parametrize("how", ["shutdown", "SIGTERM", "SIGINT"])
def test_shutdown_while_it_streams(talker: Path, how: str) -> None:
    """What can be done within the grace is done, what cannot is cut; then exit 0, all within 5 s."""
    slow = {**LONG, "max_tokens": 2048, "logprobs": 20}
    grace = [] if how == "SIGTERM" else ["--shutdown-grace-sec", 0.5]
    with serving("--model", talker, "--max-batch", 2, *grace) as server, ThreadPoolExecutor(13) as pool:
        runs: list[Any] = [pool.submit(server.run, **slow, job_id=f"long{i}") for i in range(12)]
        short = pool.submit(lambda: server.run(**SHORT, job_id="short"))
        until(lambda: len(server.events("execute_start")) == 13)
        start = time.monotonic()
        ending(server, how)
        refused = threading.Event()

        def refuses() -> bool:
            with server.client() as client:
                response = client.post("/execute", json={**SHORT, "job_id": f"new{time.monotonic()}"})
            if response.status_code == 503:
                assert response.json()["code"] == "SHUTTING_DOWN"
                refused.set()
            return refused.is_set()

        until(refuses)
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - start < 8  # 5 s, and some for a busy machine
        results = [run.result() for run in [*runs, short]]
        endings = {(name, data.get("code")) for name, data in (events[-1] for events in results)}
        assert endings <= {("end", None), ("error", "CANCELLED")}
        assert ("error", "CANCELLED") in endings
        assert server.events("shutdown")[-1]["jobs_cut"] == sum(e[-1][0] == "error" for e in results)


def test_whole_answers_are_sent_before_a_shutdown_ends(talker: Path) -> None:
    """With scores of its prompt, which are put into words after the job has ended."""
    body = {"prompt": "go on " * 300, "max_tokens": 200, "seed": 5, "echo": True, "logprobs": 5}
    with serving("--model", talker) as server, ThreadPoolExecutor(1) as pool:
        with server.client() as client:
            expected = client.post("/v1/completions", json=body).json()["choices"]
            answer = pool.submit(client.post, "/v1/completions", json=body)
            until(lambda: len(server.events("execute_start")) == 2)
            ending(server, "SIGTERM")
            response = answer.result()
        assert (response.status_code, response.json()["choices"]) == (200, expected)
        assert server.process.wait(timeout=20) == 0


def test_killed_and_started_again(talker: Path, expected: str) -> None:
    """In the middle of a stream, whose client sees it end without a last event; on the same port at once."""
    port = free_port()
    for _ in range(2):
        with serving("--model", talker, "--port", port) as server:
            server.url = f"http://127.0.0.1:{port}"
            assert text_of(server.run(**SHORT)) == expected
            with server.client() as client, server.stream(client, **LONG) as events:
                read(events, 3)
                server.process.kill()
                server.process.wait()
                with pytest.raises(httpx.TransportError):
                    list(events)


@pytest.mark.parametrize("how", ["cut", "overwritten", "replaced", "removed"])
def test_model_file_that_changes_while_it_serves(tmp_path: Path, how: str, expected: str) -> None:
    """The model is the one that was loaded, for good; also the parts of it that no request has needed before."""
    path = write_talker(tmp_path)
    with serving("--model", path) as server:
        if how == "cut":
            os.truncate(path, 4096)
        elif how == "overwritten":
            size = path.stat().st_size
            with open(path, "r+b") as file:
                file.seek(size // 2)
                file.write(bytes(size - size // 2))
        elif how == "replaced":
            (tmp_path / "other").write_bytes(b"GGUF")
            (tmp_path / "other").replace(path)
        else:
            path.unlink()
        texts = {text_of(server.run(**SHORT)) for _ in range(2)}
    assert texts == {expected}
