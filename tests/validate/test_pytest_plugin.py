"""The fixture `assert_agrees` in a suite of a user's own, run by pytest in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli_runner import ENVIRONMENT, ROOT, cli
from tests.model_files import ModelFiles

SUITE = """
def test_mine(assert_agrees):
    outcome = assert_agrees({arguments})
    assert outcome.verdict.tensors
"""


@pytest.fixture
def dump(tiny_model: ModelFiles, tmp_path: Path) -> Path:
    output = tmp_path / "d.safetensors"
    given = ("--ids", "5,6,7,8", "--model", tiny_model("llama-q4_0"), "--output", output)
    assert cli("trace", "--numerics", "llamacpp", *given).code == 0
    return tmp_path / "d.manifest.json"


def run_suite(folder: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(SUITE.format(arguments=arguments))
    # The plugin is found through the installed package's entry point.
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
    )


def test_a_right_dump_passes(tiny_model: ModelFiles, dump: Path, tmp_path: Path) -> None:
    done = run_suite(tmp_path, f"{str(tiny_model('llama-q4_0'))!r}, peer={str(dump)!r}")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_a_wrong_one_fails_with_the_verdict_and_no_traceback(
    tiny_model: ModelFiles, dump: Path, tmp_path: Path
) -> None:
    values = load_file(tmp_path / "d.safetensors")
    values["ffn_up-1"] = values["ffn_up-1"] * np.float32(1.001)
    save_file(values, tmp_path / "d.safetensors")
    done = run_suite(tmp_path, f"{str(tiny_model('llama-q4_0'))!r}, peer={str(dump)!r}")
    assert done.returncode == 1
    assert "DIVERGES: ffn_up-1 is the first tensor with an error of its own" in done.stdout
    assert "Traceback" not in done.stdout
    assert "check_agreement" not in done.stdout


def test_a_prompt_for_a_dump_is_wrong_use(tiny_model: ModelFiles, dump: Path, tmp_path: Path) -> None:
    done = run_suite(tmp_path, f"{str(tiny_model('llama-q4_0'))!r}, 'hello', peer={str(dump)!r}")
    assert done.returncode == 1
    assert "a dump contains its prompt" in done.stdout


@pytest.mark.llamacpp
def test_llamacpp_with_small_micro_batches(tiny_model: ModelFiles, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    done = run_suite(tmp_path, f"{str(tiny_model('qwen2-q8_0'))!r}, list(range(1, 40)), n_ubatch=16")
    assert done.returncode == 0, done.stdout
