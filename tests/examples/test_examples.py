"""Every example of tools/examples runs, and prints what it promises."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "01_step_through_a_layer": "attn_norm-0",
    "02_find_the_wrong_tensor": "DIVERGES: attn_norm-0 is the first tensor with an error of its own",
    "03_replace_a_tensor": "moves the logits by an NMSE of",
    "04_score_a_prompt": "perplexity",
    "05_serve_and_ask": "\n",
    "06_step_function": "seed 9, ended by",
}


def test_all_examples_are_here() -> None:
    assert {path.stem for path in (ROOT / "tools" / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    if name.startswith("02") and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[name] in done.stdout
