"""Whatever a file holds, the command line answers with one line and exit code 2, and the terminal obeys none of it."""

import json
from pathlib import Path

import pytest

from tests.cli_runner import cli, subprocess_cli, write_llama, write_qwen2
from tests.gguf_builder import ARRAY, F32, I32, STRING, U32, U64
from tests.model_files import Pair, rewrite


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("cli"))


# What an attacker may write into a file that is otherwise the tiny llama model: key -> pair (None: without it).
BAD_KEYS: dict[str, dict[str, Pair | None]] = {
    "no architecture": {"general.architecture": None},
    "unknown architecture": {"general.architecture": (STRING, "x\n\x1b[31mred" * 1000)},
    "layers 2^31": {"llama.block_count": (U32, 2**31)},
    "layers 2^64-1": {"llama.block_count": (U64, 2**64 - 1)},
    "layers 9999": {"llama.block_count": (U32, 9999)},
    "no layers": {"llama.block_count": (U32, 0)},
    "one layer more": {"llama.block_count": (U32, 2)},
    "embedding 2^31-1": {"llama.embedding_length": (U32, 2**31 - 1)},
    "embedding 2^63": {"llama.embedding_length": (U64, 2**63)},
    "no heads": {"llama.attention.head_count": (U32, 0)},
    "negative heads": {"llama.attention.head_count": (I32, -6)},
    "no kv heads": {"llama.attention.head_count_kv": (U32, 0)},
    "kv heads 2^31-1": {"llama.attention.head_count_kv": (U32, 2**31 - 1)},
    "huge heads": {"llama.attention.key_length": (U32, 2**31 - 2), "llama.attention.value_length": (U32, 2**31 - 2)},
    "context 2^62": {"llama.context_length": (U64, 2**62)},
    "NaN epsilon": {"llama.attention.layer_norm_rms_epsilon": (F32, float("nan"))},
    "NaN base": {"llama.rope.freq_base": (F32, float("nan"))},
    "no base": {"llama.rope.freq_base": (F32, 0.0)},
    "no tokens": {"tokenizer.ggml.tokens": None},
    "empty tokens": {"tokenizer.ggml.tokens": (ARRAY, (STRING, []))},
    "few tokens": {"tokenizer.ggml.tokens": (ARRAY, (STRING, ["<unk>", "<s>", "</s>"]))},
    "integer tokens": {"tokenizer.ggml.tokens": (ARRAY, (I32, [1, 2, 3]))},
    "few scores": {"tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * 5))},
    "few types": {"tokenizer.ggml.token_type": (ARRAY, (I32, [1] * 5))},
    "BOS out of range": {"tokenizer.ggml.bos_token_id": (U32, 2**31)},
    "unknown tokenizer": {"tokenizer.ggml.model": (STRING, "rwkv")},
    "name is a number": {"general.name": (U32, 7)},
    "layers are text": {"llama.block_count": (STRING, "3")},
}
ZERO: tuple[tuple[int, ...], int, bytes] = ((0, 96), 0, b"")


def malformed(model: Path, target: Path, kind: str) -> Path:
    """A malformed file: one of BAD_KEYS, or damage to tensors or bytes."""
    if kind in BAD_KEYS:
        return rewrite(model, target, keys=BAD_KEYS[kind])
    if kind == "empty embedding":
        return rewrite(model, target, tensors={"token_embd.weight": ZERO})
    if kind == "vector embedding":
        return rewrite(model, target, tensors={"token_embd.weight": ((416 * 96,), 0, bytes(4 * 416 * 96))})
    if kind == "IQ2_XXS":
        return rewrite(model, target, tensors={"blk.0.ffn_up.weight": ((224, 256), 16, bytes(224 * 66))})
    raw = model.read_bytes()
    damaged = {
        "cut": raw[: len(raw) // 2],
        "header only": raw[:24],
        "empty": b"",
        "text": b"not a model\n" * 100,
        "byte-swapped": raw[:4] + raw[7:3:-1] + raw[8:],
        "counts": raw[:8] + b"\xff" * 16 + raw[24:],
    }
    target.write_bytes(damaged[kind])
    return target


DAMAGE = ["empty embedding", "vector embedding", "IQ2_XXS"]
BROKEN = ["cut", "header only", "empty", "text", "byte-swapped", "counts"]


@pytest.mark.parametrize("kind", [*BAD_KEYS, *DAMAGE, *BROKEN])
def test_malformed_file_is_one_line(llama: Path, tmp_path: Path, kind: str) -> None:
    path = malformed(llama, tmp_path / "bad.gguf", kind)
    output = tmp_path / "x.npz"
    error = cli("logits", "--ids", "1,2", "--model", path, "--output", output).error
    assert "bad.gguf" in error
    assert len(error) < 1500
    assert error.isprintable()
    assert not output.exists()
    # `inspect` shows what can be shown: a file that is GGUF is inspected, and is said not to run.
    result = cli("inspect", path)
    if kind in BROKEN or kind == "empty embedding":
        assert "bad.gguf" in result.error
    else:
        assert result.code == 0, result.err
        (runs,) = (line for line in result.out.splitlines() if line.startswith("runs here"))
        assert runs.split(maxsplit=2)[2].startswith("no: ")
        assert json.loads(cli("inspect", path, "--json").out)["runs_here"].startswith("no: ")


def test_the_file_that_is_not_malformed_runs(llama: Path, tmp_path: Path) -> None:
    """Control for the test above: the same commands on the file unchanged."""
    path = rewrite(llama, tmp_path / "bad.gguf")
    assert cli("logits", "--ids", "1,2", "--model", path, "--output", tmp_path / "x.npz").code == 0
    assert "runs here     yes" in cli("inspect", path).out


@pytest.mark.parametrize("kind", ["layers 2^31", "no tokens", "NaN epsilon", "empty embedding", "counts"])
def test_malformed_file_is_one_line_for_a_user(llama: Path, tmp_path: Path, kind: str) -> None:
    path = malformed(llama, tmp_path / "bad.gguf", kind)
    result = subprocess_cli("logits", "--ids", "1,2", "--model", path, "--output", tmp_path / "x.npz")
    assert "bad.gguf" in result.error
    if kind in ("empty embedding", "counts"):
        assert "bad.gguf" in subprocess_cli("inspect", path).error


def test_nothing_in_a_file_reaches_the_terminal_as_a_command(llama: Path, tmp_path: Path) -> None:
    evil = "\x1b[2J\x07\x9b\u202eevil"
    keys: dict[str, Pair | None] = {"general.name": (STRING, evil), f"x.{evil}": (STRING, evil)}
    path = rewrite(llama, tmp_path / "evil.gguf", keys=keys)
    for result in (
        cli("inspect", path),
        cli("generate", "--ids", "1", "--model", path, "--max-tokens", 1, "--no-echo", "--temperature", 0),
    ):
        assert result.code == 0
        assert "evil" in result.out + result.err
        assert not set("\x1b\x07\x9b\u202e") & set(result.out + result.err)
