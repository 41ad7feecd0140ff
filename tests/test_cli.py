"""The command line: what each command prints and writes, its exit codes, and that no mistake ends in a traceback."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import refengine
from refengine import commands
from refengine.cli import build_parser, main
from tests.gguf_builder import ARRAY, F32, I32, STRING, U32, U64, GGUFBuilder
from tests.model_files import Pair, float_bytes, read_floats, rewrite, split
from tools.make_model import write_model

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (  # greedy continuation of "Once upon a time", published by the model's author
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    'Lily\'s mom said, "Lily, let\'s go to the park."'
)
COMMANDS = ("generate", "logits", "trace", "tokenize", "inspect")


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, and nothing else."""
        assert self.code == 2, self.err
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("refengine: error: ")
        return line


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:  # argparse
            assert isinstance(e.code, int)
            code = e.code
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def subprocess_cli(*arguments: object, stdin: bytes = b"", **environment: str) -> Result:
    """Runs it as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "refengine", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """Byte-level vocabulary without BOS, and a chat template."""
    write_model(folder / "qwen2.gguf", "qwen2", "Q8_0", n_layer=2)
    return folder / "qwen2.gguf"


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    """SentencePiece vocabulary with BOS; no chat template; F32."""
    write_model(folder / "llama.gguf", "llama", "F32", n_layer=1)
    return folder / "llama.gguf"


@pytest.fixture(scope="module")
def no_vocab(folder: Path) -> Path:
    write_model(folder / "bare.gguf", "llama", "F32", n_layer=1, vocab="none", n_vocab=97)
    return folder / "bare.gguf"


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K.gguf"


# ---- help and wrong use -------------------------------------------------------------------------------------------

MODEL_OPTIONS = {"--model", "--device", "--numerics", "--kv-type", "--ctx", "--cpu-cache-mb", "--debug"}
PROMPT_OPTIONS = {"--prompt", "--ids", "--chunk"}
TRACE_OPTIONS = {"--break", "--watch"}
SAMPLING_OPTIONS = {
    *("--max-tokens", "--temperature", "--repetition-penalty", "--top-k", "--top-p", "--min-p", "--seed", "--stop"),
}
OPTIONS = {
    "generate": MODEL_OPTIONS | PROMPT_OPTIONS | TRACE_OPTIONS | SAMPLING_OPTIONS | {"--chat", "--echo", "--no-echo"},
    "logits": MODEL_OPTIONS | PROMPT_OPTIONS | TRACE_OPTIONS | {"--output"},
    "trace": MODEL_OPTIONS | PROMPT_OPTIONS | TRACE_OPTIONS | {"--output", "--filter", "--list"},
    "tokenize": {"--model", "--decode", "--special", "--parse-special", "--debug"},
    "inspect": {"--model", "--json", "--debug"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_mentions_every_option(cli: Callable[..., Result], command: str) -> None:
    result = cli(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert {option for option in OPTIONS[command] if not re.search(rf"{option}(?![\w-])", result.out)} == set()
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    known = {o for action in subparsers.choices[command]._actions for o in action.option_strings}
    assert OPTIONS[command] <= known, "control: the list above is of real options"
    assert all(option in result.out for option in known)


def test_help_lists_the_commands(cli: Callable[..., Result]) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)
    assert cli("--version").out.split() == ["refengine", refengine.__version__]


@pytest.mark.parametrize(
    "arguments",
    [(), ("sing",), ("logits",), ("logits", "--model", "x"), ("generate", "--mod", "x"), ("inspect", "--frobnicate")],
)
def test_wrong_arguments_exit_with_2(cli: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("usage: refengine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give the prompt once"),
        (["generate", "a", "--prompt", "b"], "(2 were given)"),
        (["generate", "a", "--ids", "1"], "(2 were given)"),
        (["generate", "--ids", "1,x"], "'1,x' is not a list of token ids"),
        (["generate", "--ids", ""], "the prompt is empty"),
        (["generate", "--ids", "1,320"], "token id 320 is outside the vocabulary of 320"),
        (["generate", "--ids", "[-1]"], "token id -1"),
        (["generate", "--ids", "9" * 5000], "not a list of token ids"),
        (["generate", "--ids", "9" * 40], "is outside the vocabulary"),
        (["generate", "a", "--temperature", "nan"], "temperature"),
        (["generate", "a", "--temperature", "2.5"], "temperature"),
        (["generate", "a", "--top-k", "-1"], "top_k"),
        (["generate", "a", "--seed", "-1"], "seed"),
        (["generate", "a", "--max-tokens", "0"], "max_tokens"),
        (["generate", "a", "--stop", ""], "stop"),
        (["generate", "a", *(["--stop", "x"] * 5)], "stop"),
        (["generate", "a", "--ctx", "0"], "n_ctx 0"),
        (["generate", "a", "--ctx", "1"], "context"),
        (["generate", "a", "--ctx", str(2**40)], "n_ctx"),
        (["generate", "a", "--chunk", "0"], "--chunk 0"),
        (["generate", "a", "--cpu-cache-mb", "-1"], "cpu_cache_mb -1"),
        (["generate", "a", "--device", "tpu"], "unknown device 'tpu'"),
        (["generate", "--ids", "1", "--chat"], "--chat needs a prompt as text"),
        (["trace", "--ids", "1"], "give --output FILE.safetensors, or --list"),
        (["trace", "--ids", "1", "--list", "--filter", "("], "'(' is not a regular expression"),
        (["trace", "--ids", "1", "--list", "--filter", "nonsense"], "no tensor matches --filter 'nonsense'"),
        (["trace", "--ids", "1", "--list", "--break", "Qcur-9"], "no such tensor: Qcur-9"),
        (["tokenize", "--decode", "1,two"], "not a list of token ids"),
        (["tokenize", "--decode", "320"], "token id 320"),
    ],
)
def test_unusable_request_is_one_line(
    cli: Callable[..., Result], model: Path, arguments: list[str], message: str
) -> None:
    result = cli(*arguments, "--model", model)
    assert result.code == 2
    assert result.out == ""
    errors = [line for line in result.err.splitlines() if line.startswith("refengine: error: ")]
    assert result.err.splitlines()[-1:] == errors  # there is one, and it is the last
    assert message in errors[0]


def test_debug_shows_the_traceback(model: Path) -> None:
    with pytest.raises(refengine.RefengineError, match="temperature"):
        main(["generate", "a", "--model", str(model), "--temperature", "9", "--debug"])


@pytest.mark.parametrize("command", ["inspect", "tokenize", "logits"])
def test_missing_file(cli: Callable[..., Result], tmp_path: Path, command: str) -> None:
    more = {"inspect": [], "tokenize": ["a"], "logits": ["--prompt", "a", "--output", tmp_path / "x.npz"]}[command]
    assert "nothing.gguf" in cli(command, *more, "--model", tmp_path / "nothing.gguf").error
    assert "is a directory" in cli(command, *more, "--model", tmp_path).error


# ---- malformed files ----------------------------------------------------------------------------------------------

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
def test_malformed_file_is_one_line(
    cli: Callable[..., Result], llama: Path, tmp_path: Path, kind: str
) -> None:
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


def test_the_file_that_is_not_malformed_runs(cli: Callable[..., Result], llama: Path, tmp_path: Path) -> None:
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


def test_nothing_in_a_file_reaches_the_terminal_as_a_command(
    cli: Callable[..., Result], llama: Path, tmp_path: Path
) -> None:
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


# ---- generate -----------------------------------------------------------------------------------------------------


def test_published_text(cli: Callable[..., Result], stories: Path) -> None:
    result = cli("generate", "Once upon a time", "--model", stories, "--temperature", 0, "--max-tokens", 200)
    assert result.code == 0
    assert result.out.startswith(PUBLISHED)
    assert result.out.endswith("\n")
    statistics = result.err.splitlines()[-1]
    assert "200 generated" in statistics
    assert "stop: length" in statistics
    assert "device cpu, numerics exact, KV cache float32" in result.err


def test_published_text_on_every_profile(cli: Callable[..., Result], stories: Path) -> None:
    for more in (["--numerics", "exact64"], ["--numerics", "llamacpp"], ["--cpu-cache-mb", 0], ["--chunk", 1]):
        result = cli("generate", "Once upon a time", "--model", stories, "--temperature", 0, "--max-tokens", 70, *more)
        assert result.code == 0
        assert PUBLISHED.startswith(result.out[:-1])
        assert len(result.out) > 150


def test_stop_string_across_tokens(cli: Callable[..., Result], stories: Path) -> None:
    result = cli("generate", "Once upon a time", "--model", stories, "--temperature", 0, "--stop", "little girl named")
    assert result.out == "Once upon a time, there was a \n"
    assert "stop: stop" in result.err
    ids = json.loads(cli("tokenize", "little girl named", "--model", stories, "--no-special").out)
    assert len(ids) > 2, "control: the stop string is several tokens"


def test_same_seed_same_text(cli: Callable[..., Result], stories: Path) -> None:
    def text(seed: int) -> str:
        result = cli("generate", "One day", "--model", stories, "--temperature", 1.2, "--max-tokens", 40, "--seed", seed)
        assert f"seed {seed}" in result.err
        return result.out

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_drawn_seed_is_reported_and_repeats_the_text(cli: Callable[..., Result], stories: Path) -> None:
    arguments = ["generate", "One day", "--model", stories, "--temperature", 1.2, "--max-tokens", 40]
    first = cli(*arguments)
    seed = first.err.split("seed ")[1].strip()
    assert cli(*arguments, "--seed", seed).out == first.out


def test_end_token_stops(cli: Callable[..., Result], llama: Path, tmp_path: Path) -> None:
    arguments = ["--ids", "5,9", "--temperature", 0, "--max-tokens", 6]
    params = refengine.SamplingParams(temperature=0, max_tokens=6)
    greedy = [token.id for token in refengine.load(llama).generate([5, 9], params)]
    end = next(i for i in greedy if greedy.index(i) > 0)
    path = rewrite(llama, tmp_path / "ends.gguf", keys={"tokenizer.ggml.eos_token_id": (U32, end)})
    result = cli("generate", *arguments, "--model", path)
    assert f"{greedy.index(end) + 1} generated" in result.err
    assert "stop: eos" in result.err
    assert "6 generated" in cli("generate", *arguments, "--model", llama).err, "control"


def test_prompt_given_as_option_stdin_or_ids_is_the_same(
    cli: Callable[..., Result], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = cli("tokenize", "an ox", "--model", llama).out.strip()
    more = ["--model", llama, "--temperature", 0, "--max-tokens", 8]
    plain = cli("generate", "an ox", *more)
    assert cli("generate", "--prompt", "an ox", *more).out == plain.out
    for dash in (["-"], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("an ox"))
        assert cli("generate", *dash, *more).out == plain.out
    by_ids = cli("generate", "--ids", ids, *more)
    assert by_ids.code == 0
    assert "an ox" + by_ids.out == plain.out, "ids are not echoed"
    assert cli("generate", "--ids", ids.strip("[]"), *more).out == by_ids.out
    assert cli("generate", "--ids", "7, 8", *more).out != by_ids.out


def test_echo(cli: Callable[..., Result], llama: Path) -> None:
    more = ["--model", llama, "--temperature", 0, "--max-tokens", 4]
    continuation = cli("generate", "an ox", *more, "--no-echo").out
    assert not continuation.startswith("an ox")
    assert cli("generate", "an ox", *more).out == "an ox" + continuation
    assert cli("generate", "an ox", *more, "--echo").out == "an ox" + continuation
    by_ids = cli("generate", "--ids", "7,8", *more).out
    assert cli("generate", "--ids", "7,8", *more, "--echo").out == "7,8:" + by_ids


def test_chat_template_is_used_unless_told_not_to(cli: Callable[..., Result], model: Path) -> None:
    more = ["--model", model, "--temperature", 0, "--max-tokens", 4]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = cli("tokenize", rendered, "--parse-special", "--no-special", "--model", model).out.strip()
    by_ids = cli("generate", "--ids", ids, *more).out
    chat = cli("generate", "hi", *more)
    assert chat.out == by_ids, "the template's text, parsed; the prompt is not echoed"
    assert cli("generate", "hi", *more, "--chat").out == by_ids
    assert f"prompt {len(json.loads(ids))} tokens" in chat.err
    plain = cli("generate", "hi", *more, "--no-chat")
    assert plain.out.startswith("hi")
    assert plain.out != "hi" + by_ids


def test_chat_without_a_template_is_refused(cli: Callable[..., Result], llama: Path) -> None:
    result = cli("generate", "hi", "--chat", "--model", llama)
    assert result.code == 2
    assert "no chat template" in result.err.splitlines()[-1]


def test_file_without_vocabulary_generates_ids(cli: Callable[..., Result], no_vocab: Path) -> None:
    result = cli("generate", "--ids", "3,5", "--model", no_vocab, "--temperature", 0, "--max-tokens", 5)
    assert result.code == 0
    ids = [int(word) for word in result.out.split()]
    expected = refengine.load(no_vocab).generate([3, 5], refengine.SamplingParams(temperature=0, max_tokens=5))
    assert ids == [token.id for token in expected]
    for arguments in (["generate", "text"], ["tokenize", "text"], ["logits", "--prompt", "a", "--output", "x.npz"]):
        refused = cli(*arguments, "--model", no_vocab)
        assert refused.code == 2
        assert "has no vocabulary" in refused.err.splitlines()[-1]


def test_learned_positions_bound_the_context(cli: Callable[..., Result], tmp_path: Path) -> None:
    write_model(tmp_path / "gpt2.gguf", "gpt2", "F32", n_layer=1, n_ctx=8)
    arguments = ["logits", "--ids", "1,2,3,4,5,6,7,8,9", "--model", tmp_path / "gpt2.gguf", "--output", tmp_path / "x.npz"]
    assert "only 8 of them" in cli(*arguments, "--ctx", 9).error
    result = cli(*arguments)
    assert result.code == 2
    assert "9 tokens, the context holds 8" in result.err


# ---- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numerics", "dtype"), [("exact", "float32"), ("exact64", "float64"), ("llamacpp", "float32")])
def test_logits_file(
    cli: Callable[..., Result], llama: Path, tmp_path: Path, numerics: str, dtype: str
) -> None:
    output = tmp_path / "x.npz"
    result = cli("logits", "--prompt", "an ox", "--model", llama, "--numerics", numerics, "--output", output)
    assert (result.code, result.out) == (0, "")
    assert f"numerics {numerics}" in result.err
    ids = json.loads(cli("tokenize", "an ox", "--model", llama).out)
    with np.load(output) as data:
        assert set(data) == {"ids", "logits"}
        assert data["ids"].dtype == np.int64
        assert data["ids"].tolist() == ids
        assert (data["logits"].dtype, data["logits"].shape) == (dtype, (len(ids), 416))
        np.testing.assert_array_equal(data["logits"], refengine.load(llama, numerics=numerics).forward(ids))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"], "no temporary file is left"
    assert output.stat().st_mode & 0o777 == 0o644


def test_logits_without_vocabulary(cli: Callable[..., Result], no_vocab: Path, tmp_path: Path) -> None:
    assert cli("logits", "--ids", "[3, 5, 96]", "--model", no_vocab, "--output", tmp_path / "x.npz").code == 0
    with np.load(tmp_path / "x.npz") as data:
        assert data["ids"].tolist() == [3, 5, 96]
        assert data["logits"].shape == (3, 97)


def test_split_file_loads_as_one(cli: Callable[..., Result], llama: Path, tmp_path: Path) -> None:
    first = split(llama, tmp_path, {"token_embd.weight", "blk.0.attn_q.weight"})
    assert first.stat().st_size < llama.stat().st_size
    outputs = [tmp_path / "split.npz", tmp_path / "whole.npz"]
    for path, output in zip((first, llama), outputs, strict=True):
        assert cli("logits", "--prompt", "an ox", "--model", path, "--output", output).code == 0
    parts, whole = (np.load(output)["logits"] for output in outputs)
    np.testing.assert_array_equal(parts, whole)
    inspected = json.loads(cli("inspect", first, "--json").out)
    assert inspected["runs_here"] == "yes"
    (tmp_path / "llama-00002-of-00002.gguf").unlink()
    assert "00002-of-00002" in cli("logits", "--prompt", "a", "--model", first, "--output", outputs[0]).error


def fail_if_loaded(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("the model was loaded before the arguments were checked")


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("logits", "missing/x.npz", "does not exist or cannot be written"),
        ("logits", "x.npy", "must end in .npz"),
        ("trace", "missing/x.safetensors", "does not exist or cannot be written"),
        ("trace", "x.npz", "must end in .safetensors"),
    ],
)
def test_bad_output_is_refused_before_the_model_is_loaded(
    cli: Callable[..., Result],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    message: str,
) -> None:
    monkeypatch.setattr(commands, "load", fail_if_loaded)
    assert message in cli(command, "--ids", "1", "--model", llama, "--output", tmp_path / name).error


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_interrupted_write_leaves_nothing(
    cli: Callable[..., Result],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def half(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise error

    def half_file(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(np, "savez", half)
    monkeypatch.setattr("safetensors.numpy.save_file", half_file)
    for command, suffix in (("logits", "npz"), ("trace", "safetensors")):
        result = cli(command, "--ids", "1", "--model", llama, "--output", tmp_path / f"new.{suffix}")
        assert result.code == code
        assert list(tmp_path.iterdir()) == []
        old = tmp_path / f"old.{suffix}"
        old.write_bytes(b"an earlier result")
        assert cli(command, "--ids", "1", "--model", llama, "--output", old).code == code
        assert old.read_bytes() == b"an earlier result"
        old.unlink()


# ---- trace --------------------------------------------------------------------------------------------------------


def test_trace_file_and_manifest(cli: Callable[..., Result], llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    arguments = ["trace", "--prompt", "an ox", "--model", llama, "--chunk", 3]
    result = cli(*arguments, "--filter", "^(Qcur|kq|result_norm)(-|$)", "--output", output)
    assert (result.code, result.out) == (0, "")
    ids = json.loads(cli("tokenize", "an ox", "--model", llama).out)
    assert 3 < len(ids) <= 6
    rest = len(ids) - 3

    manifest = json.loads((tmp_path / "x.manifest.json").read_text(encoding="utf-8"))
    model = refengine.load(llama)
    cfg = model.config
    expected = {
        "Qcur-0": ("Qcur", 0, None, [len(ids), cfg.n_head, cfg.head_dim]),
        "Qcur-0#0": ("Qcur", 0, 0, [len(ids), cfg.n_embd_q]),
        "kq-0@0": ("kq", 0, None, [cfg.n_head, 3, 3]),
        "kq-0@1": ("kq", 0, None, [cfg.n_head, rest, len(ids)]),
        "result_norm": ("result_norm", None, None, [len(ids), cfg.n_embd]),
    }
    listed = {t["name"]: (t["tensor"], t["layer"], t["occurrence"], t["shape"]) for t in manifest["tensors"]}
    assert listed == expected
    assert manifest["ids"] == ids
    assert (manifest["arch"], manifest["numerics"], manifest["kv_type"]) == ("llama", "exact", "float32")
    assert manifest["model_sha256"] == commands.file_sha256(llama)
    with safe_open(output, framework="numpy") as tensors:
        assert set(tensors.keys()) == set(expected)
        for entry in manifest["tensors"]:
            value = tensors.get_tensor(entry["name"])
            assert (list(value.shape), str(value.dtype)) == (entry["shape"], entry["dtype"])
        trace = refengine.Trace("^Qcur-0$")
        model.forward(ids, trace=trace, chunk=3)
        np.testing.assert_array_equal(tensors.get_tensor("Qcur-0"), trace.result()["Qcur-0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.manifest.json", "x.safetensors"]


def test_trace_list_prints_every_name(cli: Callable[..., Result], llama: Path) -> None:
    result = cli("trace", "--ids", "1,2,3", "--model", llama, "--list")
    assert result.code == 0
    trace = refengine.Trace("")
    refengine.load(llama).forward([1, 2, 3], trace=trace)
    assert [line.split()[0] for line in result.out.splitlines()] == list(trace.result())
    line = next(line for line in result.out.splitlines() if line.startswith("kq-0 "))
    assert line.split()[1:3] == ["6x3x3", "float32"]
    assert len(cli("trace", "--ids", "1", "--model", llama, "--list", "--filter", "^l_out").out.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "logits", "trace"])
def test_watch_names_the_first_bad_tensor(
    cli: Callable[..., Result], llama: Path, tmp_path: Path, command: str
) -> None:
    up = read_floats(llama, "blk.0.ffn_up.weight")
    up[4, 2] = np.nan
    path = rewrite(llama, tmp_path / "nan.gguf", tensors={"blk.0.ffn_up.weight": (up.shape, 0, float_bytes(up))})
    more = {
        "generate": [],
        "logits": ["--output", tmp_path / "x.npz"],
        "trace": ["--output", tmp_path / "x.safetensors"],
    }[command]
    result = cli(command, "--ids", "1,2", "--model", path, "--watch", *more)
    assert result.code == 2
    assert "tensor ffn_up-0 is the first with a non-finite value: nan at (0, 4)" in result.err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["nan.gguf"]
    if command == "generate":  # without the watch sampling notices
        assert "logits[0] is NaN" in cli(command, "--ids", "1,2", "--model", path).err


# ---- tokenize -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello, wörld 🦙\n\t x", "", " leading and trailing "])
def test_tokenize_round_trip(
    cli: Callable[..., Result], model: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    encoded = cli("tokenize", text, "--model", model)
    assert (encoded.code, encoded.err) == (0, "")
    ids = json.loads(encoded.out)
    assert all(isinstance(i, int) for i in ids)
    for given in (encoded.out.strip(), ",".join(map(str, ids)), " ".join(map(str, ids))):
        assert cli("tokenize", given, "--decode", "--model", model).out == text + "\n"
    for stdin in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert cli("tokenize", *stdin, "--model", model).out == encoded.out


def test_tokenize_specials(cli: Callable[..., Result], llama: Path, model: Path) -> None:
    with_bos, without = (json.loads(cli("tokenize", "an", "--model", llama, *o).out) for o in ([], ["--no-special"]))
    assert with_bos == [1, *without]
    parsed = json.loads(cli("tokenize", "<|im_end|>", "--model", model, "--parse-special").out)
    escaped = json.loads(cli("tokenize", "<|im_end|>", "--model", model).out)
    assert len(parsed) == 1 < len(escaped)
    assert cli("tokenize", json.dumps(escaped), "--decode", "--model", model).out == "<|im_end|>\n"


# ---- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_in_the_file(cli: Callable[..., Result], model: Path) -> None:
    result = cli("inspect", model)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "quant_kind Q8_0" in lines
    assert "runs here yes" in lines
    assert "qwen2.block_count = 2" in lines
    assert "general.architecture = 'qwen2'" in lines
    assert any(line.startswith("Q8_0 15 tensors") for line in lines)  # 7 matrices a layer, and the embedding
    assert any(line.startswith("tokenizer.ggml.tokens = [") and line.endswith("(320)") for line in lines)
    assert cli("inspect", "--model", model).out == result.out


def test_inspect_json(cli: Callable[..., Result], model: Path) -> None:
    found = json.loads(cli("inspect", model, "--json").out)
    assert (found["version"], found["quant_kind"], found["runs_here"]) == (3, "Q8_0", "yes")
    assert found["file_size"] == model.stat().st_size
    assert found["metadata"]["qwen2.embedding_length"] == 96
    assert len(found["metadata"]["tokenizer.ggml.tokens"]) == 320
    embedding = next(t for t in found["tensors"] if t["name"] == "token_embd.weight")
    assert (embedding["type"], embedding["shape"], embedding["bytes"]) == ("Q8_0", [320, 96], 320 * 3 * 34)
    assert sum(t["bytes"] for t in found["types"].values()) == sum(t["bytes"] for t in found["tensors"])
    assert sum(t["tensors"] for t in found["types"].values()) == len(found["tensors"])


def test_inspect_wants_one_file(cli: Callable[..., Result], model: Path) -> None:
    assert "give one GGUF file" in cli("inspect").error
    assert "give one GGUF file" in cli("inspect", model, "--model", model).error


def test_inspect_of_a_file_that_is_no_model(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = GGUFBuilder().pair("a.b", U32, 7).tensor("x", [3]).write(tmp_path / "any.gguf")
    result = cli("inspect", path)
    assert result.code == 0
    assert "a.b = 7" in result.out
    assert "no: " in result.out
    assert "general.architecture" in result.out


# ---- device -------------------------------------------------------------------------------------------------------


def test_cuda_without_cupy_is_one_line(
    cli: Callable[..., Result], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for device in ("cuda", "cuda:1"):
        assert "install refengine[cuda13]" in cli("generate", "a", "--model", llama, "--device", device).error


def test_auto_says_which_device_it_took_and_why(
    cli: Callable[..., Result], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    result = cli("generate", "a", "--model", llama, "--device", "auto", "--max-tokens", 1)
    assert result.code == 0
    assert "device cpu (no GPU serves: device cuda:0 needs CuPy" in result.err
    assert "(" not in cli("generate", "a", "--model", llama, "--max-tokens", 1).err.split("device cpu")[1].split(",")[0]


# ---- interruption and broken output -------------------------------------------------------------------------------


def test_interruption_exits_with_130(
    cli: Callable[..., Result], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load", interrupted)
    result = cli("generate", "a", "--model", llama)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "refengine: interrupted"


def endless(model: Path) -> list[str]:
    """A command that prints until it is stopped."""
    return [sys.executable, "-m", "refengine", "generate", "--ids", "5", "--model", str(model)] + [
        *("--ctx", "1000000", "--max-tokens", "1000000", "--temperature", "1")
    ]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "utf-8"}
    )


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
