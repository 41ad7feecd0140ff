"""Jobs that end where they are easily forgotten: before the engine has them, and where the engine fails around them."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.worker.server import Event, Server, serving, text_of, until, write_talker
from tools.make_model import write_model
from tools.model_vocab import CHATML

# `refengine serve` that takes its time to make tokens of a prompt with "slow" in it.
SLOW_TO_ENCODE = """
import sys, time
from refengine.cli import main as cli
from refengine.tokenizer.bpe import ByteLevelBPE
encode = ByteLevelBPE.encode
def slow(self, text, **keywords):
    if "slow" in text:
        time.sleep(float(sys.argv[-1]))
    return encode(self, text, **keywords)
ByteLevelBPE.encode = slow
sys.exit(cli.main(sys.argv[2:-1]))
"""

# `refengine serve` whose step fails right after one of its sequences has had its last token.
FAILS_AFTER_AN_END = """
import sys
from refengine.cli import main as cli
from refengine.engine.engine import Engine
sys.argv.pop(1)
accept, ended = Engine._accept, []
def faulty(self, generation, *drawn):
    if ended and ended.pop() == "now":
        raise ZeroDivisionError("a secret")
    accept(self, generation, *drawn)
    if generation.end is not None:
        ended.append("now" if len(self.scheduler.running) else "later")
Engine._accept = faulty
sys.exit(cli.main())
"""

# `refengine serve` whose engine's thread ends, by a bug, a second after a file has come to be.
DIES = """
import pathlib, sys, time
from refengine import model
from refengine.cli import main as cli
from refengine.engine.engine import Engine
flag, step, facts, doomed = pathlib.Path(sys.argv.pop(1)), model.Model.evaluate, Engine.stats, []
def slow(*arguments, **keywords):
    if flag.exists():
        doomed.append(True)
        time.sleep(1)
    return step(*arguments, **keywords)
def fatal(self):
    if doomed:
        raise ZeroDivisionError("a secret")
    return facts(self)
model.Model.evaluate, Engine.stats = slow, fatal
sys.exit(cli.main())
"""

WITHIN_S = 3.0  # for an end to be told, on a busy machine; tokenizing takes longer
ENCODE_S = 10.0
SHORT = {"prompt": "go on", "seed": 5, "max_tokens": 5}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def slow(talker: Path) -> Iterator[Server]:
    with serving("--model", talker, ENCODE_S, script=(SLOW_TO_ENCODE, "")) as server:
        yield server


def post(server: Server, path: str, **body: Any) -> tuple[httpx.Response, float]:
    """An answer, and the seconds that it took."""
    start = time.monotonic()
    with server.client() as client:
        return client.post(path, json=body), time.monotonic() - start


def ends(server: Server) -> dict[str, str]:
    """Outcome by job."""
    return {line["job_id"]: line["outcome"] for line in server.events("execute_end")}


def test_jobs_end_while_prompts_are_tokenized(slow: Server) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, slow, "/execute", job_id="first", prompt="slow", max_tokens=1)
        time.sleep(0.5)  # now it holds the one thread that tokenizes; the others wait for that
        body, header = {**SHORT, "job_id": "late"}, {"X-Deadline": "0.3"}
        late = pool.submit(httpx.post, slow.url + "/execute", json=body, headers=header)
        cancelled = pool.submit(post, slow, "/execute", **SHORT, job_id="cancelled")
        time.sleep(0.2)
        post(slow, "/cancel", job_id="cancelled")
        response, seconds = cancelled.result()
        assert (response.status_code, response.json()["code"]) == (499, "CANCELLED")
        assert seconds < WITHIN_S
        assert (late.result().status_code, late.result().json()["code"]) == (504, "INFERENCE_TIMEOUT")
        for path, body in (("/execute", {**SHORT, "job_id": "gone"}), ("/v1/completions", SHORT)):
            with slow.client(read_s=0.2) as client, pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body)
        until(lambda: sorted(ends(slow).values()) == ["cancelled", "disconnected", "disconnected", "timeout"], WITHIN_S)
        assert not first.done()
        assert first.result()[0].status_code == 200
    assert len(slow.events("execute_start")) == 1  # the engine heard of no other
    assert text_of(slow.run(**SHORT))


def test_prompts_that_nobody_waits_for_are_not_tokenized(slow: Server) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, slow, "/execute", job_id="first", prompt="slow", max_tokens=1)
        time.sleep(0.5)
        for i in range(3):
            with slow.client(read_s=0.2) as client, pytest.raises(httpx.ReadTimeout):
                client.post("/execute", json={"job_id": f"gone {i}", "prompt": "slow"})
        _, seconds = post(slow, "/execute", **SHORT, job_id="next")
        assert seconds < ENCODE_S + WITHIN_S  # and not four times that
        assert first.result()[0].status_code == 200


def test_a_shutdown_tells_those_whose_prompts_are_tokenized(slow: Server) -> None:
    with ThreadPoolExecutor() as pool:
        tried = [pool.submit(post, slow, "/execute", job_id=f"{i}", prompt="slow") for i in range(3)]
        until(lambda: slow.metric("worker_requests_total") == 0 and len(tried) == 3)
        time.sleep(0.5)
        start = time.monotonic()
        assert post(slow, "/shutdown")[0].status_code == 202
        for path, body in (("/tokenize", {"content": "a"}), ("/detokenize", {"tokens": [1]}), ("/execute", SHORT)):
            response, seconds = post(slow, path, **body)
            assert (response.status_code, response.json()["code"]) == (503, "SHUTTING_DOWN")
            assert seconds < WITHIN_S
        for one in tried:
            response, _ = one.result()
            assert (response.status_code, response.json()["code"]) == (499, "CANCELLED")
    assert slow.process.wait(timeout=20) == 0
    assert time.monotonic() - start < 5 + WITHIN_S  # jobs have 5 s; the prompt that is tokenized takes longer
    assert set(ends(slow).values()) == {"cancelled"}
    assert "Traceback" not in slow.log_file.read_text()


def test_an_answer_that_is_whole_when_its_step_fails_is_sent(talker: Path) -> None:
    with serving("--model", talker, script=(FAILS_AFTER_AN_END, "")) as server, server.client() as client:
        with server.stream(client, prompt="go on", max_tokens=300, job_id="whole") as whole:
            next(whole)
            with server.client() as other, server.stream(other, prompt="go on", max_tokens=2000) as cut:
                found = list(whole)
                assert [name for name, _ in found] == ["token"] * 300 + ["end"]
                assert found[-1][1]["stop_reason"] == "length"
                name, data = list(cut)[-1]
                assert (name, data["code"]) == ("error", "INTERNAL")
        server.settled()
        assert text_of(server.run(**SHORT))


def test_all_are_told_when_the_engines_thread_has_ended(talker: Path, tmp_path: Path) -> None:
    flag = tmp_path / "die"
    with (
        serving("--model", talker, script=(DIES, flag)) as server,
        ThreadPoolExecutor() as pool,
        server.client() as client,
    ):
        with server.stream(client, prompt="go on", max_tokens=2000) as events:
            next(events)
            flag.touch()
            time.sleep(0.3)  # now a step is under way that will be the last
            unread = pool.submit(post, server, "/execute", **SHORT, job_id="unread")
            last: Event = list(events)[-1]
        assert (last[0], last[1]["code"]) == ("error", "INTERNAL")
        response, seconds = unread.result()
        assert (response.status_code, response.json()["code"]) == (500, "INTERNAL")
        assert seconds < WITHIN_S
        response, seconds = post(server, "/execute", **SHORT, job_id="after")
        assert (response.status_code, response.json()["code"]) == (500, "INTERNAL")
        assert seconds < WITHIN_S
        assert client.get("/health").json()["status"] == "unhealthy"


def test_what_is_refused_once_it_is_tokenized_was_no_job(talker: Path) -> None:
    with serving("--model", talker, "--max-tokens-in", 8, "--max-batch", 2, "--max-queue", 1) as server:
        for field, body in (
            ("prompt", {"prompt": "go on and on and on"}),
            ("stop", {"prompt": "go on", "stop": ["12345678" * 5]}),
            ("top_k", {"prompt": "go on", "top_k": 1 << 20}),
        ):
            response, _ = post(server, "/execute", job_id=field, **body)
            assert (response.status_code, response.json()["field"]) == (400, field)
        response, _ = post(server, "/v1/completions", prompt=["a", "b", "c", "d"])
        assert response.status_code == 400
        assert "given 4 prompts, allowed 3 on this worker" in response.json()["error"]["message"]
        *jobs, answer = [line["job_id"] for line in server.events("error")]
        assert jobs == ["prompt", "stop", "top_k"]
        assert answer.startswith("cmpl-")
        assert ends(server) == {}
        assert server.metric("worker_requests_total", outcome="refused") == 4
        assert server.metric("worker_inference_duration_ms_count") == 0
        assert text_of(server.run(**SHORT))


def test_a_shutdown_waits_for_no_template(tmp_path: Path) -> None:
    """Of a chat that is being rendered: its client is told, and nothing goes on afterwards."""
    path = tmp_path / "endless.gguf"
    write_model(path, "qwen2", "Q8_0")
    data = path.read_bytes()
    given = CHATML.encode()
    endless = b"{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    assert given in data
    path.write_bytes(data.replace(given, endless.ljust(len(given))))
    with serving("--model", path, "--shutdown-grace-sec", 0.2) as server, ThreadPoolExecutor() as pool:
        messages = [{"role": "user", "content": "go on"}]
        chat = pool.submit(post, server, "/v1/chat/completions", messages=messages)
        until(lambda: renderers(server.process.pid))
        (renderer,) = renderers(server.process.pid)
        time.sleep(0.3)
        start = time.monotonic()
        server.process.terminate()
        response, _ = chat.result()
        assert (response.status_code, response.json()["error"]["code"]) == (499, "CANCELLED")
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - start < WITHIN_S
        until(lambda: not runs(renderer))


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def renderers(worker: int) -> list[int]:
    """Processes that render chat templates for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == worker and b"chat_renderer.py" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found
