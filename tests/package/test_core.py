"""The core install is enough for one model on one machine: the libraries of all extras are hidden here."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_runner import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
OF_EXTRAS = (
    *("fastapi", "starlette", "uvicorn", "h11", "pydantic", "prometheus_client", "threadpoolctl", "swagger_ui_bundle"),
    *("httpx", "httpx_sse", "huggingface_hub", "filelock", "cupy", "llama_cpp", "pytest", "matplotlib"),
)
HIDDEN = f"""
import sys
for name in {OF_EXTRAS!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from refengine.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
WORKER = ("--worker-id", "123e4567-e89b-12d3-a456-426614174000", "--device", "cpu", "--port", "8080")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


SPEED = ("bench", "speed")
COMMANDS = {
    "generate": ("generate", "a frog", "--max-tokens", "3"),
    "logits": ("logits", "--prompt", "a frog", "--output", "FOLDER/l.npz"),
    "trace": ("trace", "--prompt", "a frog", "--list"),
    "validate": ("validate", "a frog", "--numerics", "exact", "--peer", "refengine:exact"),
    "tokenize": ("tokenize", "a frog"),
    "inspect": ("inspect",),
    "bench speed": (*SPEED, "--prompts", "4", "--depths", "0", "--streams", "1", "--tokens", "2", "--rounds", "1"),
    "dump-header": ("dump-header",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_needs_the_core_only(command: str, tmp_path: Path) -> None:
    done = run(*(argument.replace("FOLDER", str(tmp_path)) for argument in COMMANDS[command]))
    assert done.returncode == 0, done.stderr


NEED_EXTRAS = {
    "serve": (("serve", *WORKER), "[serve]"),
    "ask": (("ask", "a frog"), "[client]"),
    "bench": (("bench", "worker", "--quick"), "[serve]"),
    "plots": ((*SPEED, "--html", "speed.html"), "[bench]"),
    "speed beside llama.cpp": ((*SPEED, "--compare", "llama.cpp"), "[validate]"),
    "hub": (("inspect", "hf:me/haiku"), "[hub]"),
    "cuda": (("generate", "a frog", "--device", "cuda"), "[cuda13]"),
    "llama.cpp": (("validate", "a frog"), "[validate]"),
}


@pytest.mark.parametrize("case", NEED_EXTRAS)
def test_a_missing_extra_is_named_in_one_line(case: str) -> None:
    arguments, extra = NEED_EXTRAS[case]
    done = run(*arguments)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("refengine: error: "), done.stderr
    assert f"pip install '.{extra}'" in last
    assert "Traceback" not in done.stderr
