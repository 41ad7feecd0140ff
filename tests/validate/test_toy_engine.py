"""An engine that is not ours: a toy Llama in C++ dumps what it computes, and the verdict is on that."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from refengine.gguf.file import GGUFFile
from refengine.models import read_config
from tests.cli_runner import cli
from tests.model_files import ModelFiles

ROOT = Path(__file__).resolve().parents[2]
ROLES = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()  # noqa: SIM905
IDS = [5, 42, 79, 116, 153, 190, 227, 264, 301, 18]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("toy") / "toy_engine"
    source = ROOT / "tests" / "validate" / "toy_engine.cpp"
    flags = ["-std=c++11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'refengine' / 'validate'}"]
    subprocess.run([compiler, *flags, source, "-o", binary], check=True)
    return binary


@pytest.fixture
def weights(tiny_model: ModelFiles, tmp_path: Path) -> Path:
    """The small Llama's tensors in the order in which the toy engine reads them."""
    with GGUFFile(tiny_model("llama-f32")) as gguf:
        cfg = read_config(gguf)
        names = ["token_embd"]
        for il in range(cfg.n_layer):
            names += [f"blk.{il}.{role}" for role in ROLES]
        names += ["output_norm", "output"]
        sizes = (cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_head_kv, cfg.head_dim, cfg.n_ff, cfg.n_vocab, len(IDS))
        blob = np.array([*sizes, *IDS], "<i4").tobytes() + b"".join(
            gguf.data(f"{name}.weight").tobytes() for name in names
        )
    (tmp_path / "weights.bin").write_bytes(blob)
    return tmp_path / "weights.bin"


def test_a_right_engine_agrees(engine: Path, weights: Path, tiny_model: ModelFiles, tmp_path: Path) -> None:
    subprocess.run([engine, weights, tmp_path / "dump"], check=True)
    model = tiny_model("llama-f32")
    result = cli("validate", "--model", model, "--peer", tmp_path / "dump", "--numerics", "exact")
    assert result.code == 0, result.out
    assert "toy engine" in result.out
    assert "same likeliest token at 100.0% of 10 positions" in result.out
    assert "of our tensors were not captured" in result.out


def test_its_planted_fault_is_found(engine: Path, weights: Path, tiny_model: ModelFiles, tmp_path: Path) -> None:
    """Keys of layer 1 are rotated one position too far from position 4 on."""
    subprocess.run([engine, weights, tmp_path / "dump", "broken"], check=True)
    model = tiny_model("llama-f32")
    result = cli("validate", "--model", model, "--peer", tmp_path / "dump", "--numerics", "exact", "--all")
    assert result.code == 1
    assert result.out.startswith("DIVERGES: Kcur-1 is the first tensor with an error of its own")
    lines = result.out.splitlines()
    assert "; only at token 4 to 9" in lines[1]
    assert lines[2] == "it is what comes out if positions are off by one from token 4 on (position + 1)"
    assert lines[3].startswith("1 of ")  # and nothing else is blamed
