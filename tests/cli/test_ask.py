"""`refengine ask` with a real worker: what it prints, errors on one line, interruptions."""

import io
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from refengine.bench.process import free_port
from refengine.client.client import Client
from tests.cli_runner import ENVIRONMENT, ROOT, cli, subprocess_cli
from tests.client.test_client import KEY, LONG, PROMPT, SAMPLING
from tests.worker.server import Server, serving, write_talker


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request runs, none waits."""
    options = ("--model", write_talker(tmp_path_factory.mktemp("ask")), "--max-batch", 1, "--max-queue", 0)
    with serving(*options) as running:
        yield running


def asked(server: Server, *arguments: object, **options: Any) -> Any:
    given = {"REFENGINE_API_KEY": KEY, **options}
    return subprocess_cli("ask", *arguments, "--url", server.url, **given)


def test_ask(server: Server) -> None:
    result = asked(server, PROMPT, "--temperature", 0.7, "--seed", 42, "--max-tokens", 50)
    with Client(server.url, KEY) as client:
        assert result.out == client.generate(PROMPT, **SAMPLING).text + "\n"
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("refengine: prompt 6 tokens (0 reused), ")
    assert line.endswith("stop: eos, seed 42")


def test_ask_reads_standard_input(server: Server) -> None:
    options = ["--temperature", 0.7, "--seed", 42]
    assert asked(server, "-", *options, stdin=PROMPT.encode()).out == asked(server, PROMPT, *options).out


def test_ask_through_the_chat_template(server: Server) -> None:
    result = asked(server, PROMPT, "--chat", "--temperature", 0.7, "--seed", 1)
    assert (result.code, len(result.out.strip().splitlines())) == (0, 3)
    assert "prompt 14 tokens" in result.err
    assert "stop: stop" in result.err


def test_ask_tells_nothing_of_a_stop_string(server: Server) -> None:
    result = asked(server, PROMPT, "--logprobs", 3, "--temperature", 0.7, "--seed", 42, "--stop", "shader")
    last = result.out.splitlines()[-1].split(maxsplit=1)
    assert last[1] == "(part of a stop string)"
    assert "shad" not in result.out


def test_ask_prints_logprobs(server: Server) -> None:
    result = asked(server, PROMPT, "--logprobs", 3, "--temperature", 0.7, "--seed", 42, "--max-tokens", 4)
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 3]
    assert all(line.count("%") == 4 for line in lines)


def test_ask_takes_the_key_from_either_place(server: Server) -> None:
    assert "UNAUTHORIZED" in asked(server, "x", REFENGINE_API_KEY="").error
    assert asked(server, "x", "--max-tokens", 1, "--api-key", KEY, REFENGINE_API_KEY="wrong").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompt once"),
        (["a", "--prompt", "b"], "(2 were given)"),
        (["a", "--chat", "--logprobs", "1"], "--logprobs cannot be used with --chat"),
        (["a", "--url", "nonsense"], "given 'nonsense', allowed http://HOST:PORT"),
        (["a", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_ask_errors_are_one_line(arguments: list[str], message: str) -> None:
    assert message in cli("ask", *arguments).error


def test_ask_tells_the_workers_error(server: Server) -> None:
    assert "INVALID_REQUEST: temperature: given 9" in asked(server, "x", "--temperature", 9).error


def test_ask_waits_where_the_worker_is_full(busy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    busy.settled()
    monkeypatch.setattr(sys, "stdin", io.StringIO("go on"))
    with Client(busy.url) as client, client.execute("go on", **LONG) as stream:
        next(stream)
        assert "QUEUE_FULL" in cli("ask", "-", "--url", busy.url).error
        threading.Timer(0.3, stream_cancel, (busy, stream.job_id)).start()
        assert cli("ask", "go on", "--max-tokens", 2, "--retries", 9, "--url", busy.url).code == 0


def stream_cancel(server: Server, job_id: str | None) -> None:
    with Client(server.url) as client:
        client.cancel(str(job_id))


def test_interrupted_ask_cancels_and_exits_with_130(busy: Server) -> None:
    busy.settled()
    line = [sys.executable, "-m", "refengine", "ask", "go on", "--max-tokens", "2048", "--url", busy.url]
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "refengine: interrupted"
    busy.settled()
    assert busy.events("execute_end")[-1]["outcome"] in ("cancelled", "disconnected")


def test_ask_of_a_worker_that_is_not_there() -> None:
    assert "cannot be reached" in cli("ask", "x", "--url", f"http://127.0.0.1:{free_port()}").error
