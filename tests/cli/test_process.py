"""The command line as a process: interruption, readers that go away, full disks, encodings."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refengine.cli import console
from tests.cli_runner import ENVIRONMENT, ROOT, cli, subprocess_cli, write_llama, write_no_vocab, write_qwen2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def no_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_no_vocab(tmp_path_factory.mktemp("cli"))


def test_interruption_exits_with_130(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "load", interrupted)
    result = cli("generate", "a", "--model", llama)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "refengine: interrupted"


def endless(model: Path) -> list[str]:
    """A command that prints until it is stopped."""
    limits = ["--ctx", "1000000", "--max-tokens", "1000000", "--temperature", "1"]
    return [sys.executable, "-m", "refengine", "generate", "--ids", "5", "--model", str(model), *limits]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT)


def test_control_c_while_generating(no_vocab: Path) -> None:
    process = start(endless(no_vocab))
    assert process.stdout is not None
    assert process.stdout.read(3)  # it is under way
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = err.decode().splitlines()
    assert "stop: interrupted" in err.decode()
    assert lines[-1] == "refengine: interrupted"
    assert b"Traceback" not in err


def test_reader_that_goes_away_is_no_error(no_vocab: Path) -> None:
    process = start(endless(no_vocab))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in err
    assert b"Exception" not in err
    assert b"Broken" not in err


@pytest.mark.parametrize("arguments", [["inspect", "--json"], ["inspect"], ["tokenize", "x" * 100_000]])
def test_output_into_a_closed_pipe(model: Path, arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "refengine", *arguments, "--model", str(model)],
        stdout=write_end,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line(model: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "refengine", "tokenize", "x", "--model", str(model)],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=ENVIRONMENT,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [b"refengine: error: OSError: [Errno 28] No space left on device"]


def test_text_that_the_terminal_cannot_show(model: Path) -> None:
    ids = "[" + ",".join(["195", "169"]) + "]"
    assert subprocess_cli("tokenize", ids, "--decode", "--model", model).code == 0
    error = subprocess_cli("tokenize", ids, "--decode", "--model", model, PYTHONIOENCODING="ascii").error
    assert "set PYTHONIOENCODING=utf-8" in error


def test_input_that_is_not_text(model: Path) -> None:
    assert "set PYTHONIOENCODING=utf-8" in subprocess_cli("tokenize", "--model", model, stdin=b"\xff\xfe").error
    strange = subprocess_cli("tokenize", "--model", model, stdin=b"\xff", PYTHONIOENCODING="utf-8:surrogateescape")
    assert "surrogate" in strange.error
