"""The command line: help, wrong use, tokenize, inspect and the choice of a device."""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import refengine
from refengine.cli.main import build_parser, main
from tests.cli_runner import cli, write_llama, write_qwen2
from tests.gguf_builder import U32, GGUFBuilder

COMMANDS = ("generate", "logits", "trace", "tokenize", "inspect")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("cli"))


# ---- help and wrong use ---------------------------------------------------------------------------------------------

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
def test_help_mentions_every_option(command: str) -> None:
    result = cli(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert {option for option in OPTIONS[command] if not re.search(rf"{option}(?![\w-])", result.out)} == set()
    (subparsers,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    known = {o for action in subparsers[command]._actions for o in action.option_strings}
    assert OPTIONS[command] <= known, "control: the list above is of real options"
    assert all(option in result.out for option in known)


def every_parser(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from every_parser(command)


def test_help_states_a_default_once_for_each_option() -> None:
    for parser in every_parser(build_parser()):
        formatter = parser._get_formatter()
        for action in parser._actions:
            assert (formatter._expand_help(action) if action.help else "").count("(default: ") <= 1, action


def test_help_lists_the_commands() -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)
    assert cli("--version").out.split() == ["refengine", refengine.__version__]


@pytest.mark.parametrize(
    "arguments",
    [(), ("sing",), ("logits",), ("logits", "--model", "x"), ("generate", "--mod", "x"), ("inspect", "--frobnicate")],
)
def test_wrong_arguments_exit_with_2(arguments: tuple[str, ...]) -> None:
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
        (["generate", "--ids", "1", "--chat"], "--chat needs a text prompt"),
        (["trace", "--ids", "1"], "give --output FILE.safetensors, or --list"),
        (["trace", "--ids", "1", "--list", "--filter", "("], "'(' is not a regular expression"),
        (["trace", "--ids", "1", "--list", "--filter", "nonsense"], "no tensor matches --filter 'nonsense'"),
        (["trace", "--ids", "1", "--list", "--break", "Qcur-9"], "no such tensor: Qcur-9"),
        (["tokenize", "--decode", "1,two"], "not a list of token ids"),
        (["tokenize", "--decode", "320"], "token id 320"),
    ],
)
def test_unusable_request_is_one_line(model: Path, arguments: list[str], message: str) -> None:
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
def test_missing_file(tmp_path: Path, command: str) -> None:
    prompts: dict[str, list[object]] = {"tokenize": ["a"], "logits": ["--ids", "1", "--output", tmp_path / "x.npz"]}
    more = prompts.get(command, [])
    assert "nothing.gguf" in cli(command, *more, "--model", tmp_path / "nothing.gguf").error
    assert "is a directory" in cli(command, *more, "--model", tmp_path).error


# ---- tokenize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello, wörld 🦙\n\t x", "", " leading and trailing "])
def test_tokenize_round_trip(model: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    encoded = cli("tokenize", text, "--model", model)
    assert (encoded.code, encoded.err) == (0, "")
    ids = json.loads(encoded.out)
    assert all(isinstance(i, int) for i in ids)
    for given in (encoded.out.strip(), ",".join(map(str, ids)), " ".join(map(str, ids))):
        assert cli("tokenize", given, "--decode", "--model", model).out == text + "\n"
    for stdin in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert cli("tokenize", *stdin, "--model", model).out == encoded.out


def test_tokenize_specials(llama: Path, model: Path) -> None:
    with_bos, without = (json.loads(cli("tokenize", "an", "--model", llama, *o).out) for o in ([], ["--no-special"]))
    assert with_bos == [1, *without]
    parsed = json.loads(cli("tokenize", "<|im_end|>", "--model", model, "--parse-special").out)
    escaped = json.loads(cli("tokenize", "<|im_end|>", "--model", model).out)
    assert len(parsed) == 1 < len(escaped)
    assert cli("tokenize", json.dumps(escaped), "--decode", "--model", model).out == "<|im_end|>\n"


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_in_the_file(model: Path) -> None:
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


def test_inspect_json(model: Path) -> None:
    found = json.loads(cli("inspect", model, "--json").out)
    assert (found["version"], found["quant_kind"], found["runs_here"]) == (3, "Q8_0", "yes")
    assert found["file_size"] == model.stat().st_size
    assert found["metadata"]["qwen2.embedding_length"] == 96
    assert len(found["metadata"]["tokenizer.ggml.tokens"]) == 320
    embedding = next(t for t in found["tensors"] if t["name"] == "token_embd.weight")
    assert (embedding["type"], embedding["shape"], embedding["bytes"]) == ("Q8_0", [320, 96], 320 * 3 * 34)
    assert sum(t["bytes"] for t in found["types"].values()) == sum(t["bytes"] for t in found["tensors"])
    assert sum(t["tensors"] for t in found["types"].values()) == len(found["tensors"])


def test_inspect_wants_one_file(model: Path) -> None:
    assert "give one GGUF file" in cli("inspect", model, "--model", model).error


def test_inspect_of_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = GGUFBuilder().pair("a.b", U32, 7).tensor("x", [3]).write(tmp_path / "any.gguf")
    result = cli("inspect", path)
    assert result.code == 0
    assert "a.b = 7" in result.out
    assert "no: " in result.out
    assert "general.architecture" in result.out


# ---- device ---------------------------------------------------------------------------------------------------------


def test_cuda_without_cupy_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for device in ("cuda", "cuda:1"):
        assert "pip install '.[cuda13]'" in cli("generate", "a", "--model", llama, "--device", device).error


def test_auto_says_which_device_it_took_and_why(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    result = cli("generate", "a", "--model", llama, "--device", "auto", "--max-tokens", 1)
    assert result.code == 0
    assert "device cpu (no GPU is usable: device cuda:0 needs CuPy" in result.err
    assert "(" not in cli("generate", "a", "--model", llama, "--max-tokens", 1).err.split("device cpu")[1].split(",")[0]
