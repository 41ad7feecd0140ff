"""What users get wrong at the command line, and what they are told."""

import io
import os
import sys
from pathlib import Path

import pytest

from refengine.model import PACKAGED_MODEL
from tests.cli_runner import ENVIRONMENT, Result, cli, subprocess_cli

GREEDY = ("--temperature", "0", "--max-tokens", "2", "--no-chat", "--no-echo")


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    from refengine.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_misspelt_commands_and_options_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(capsys, "generat", "a").rstrip().endswith("did you mean generate?")
    assert "--temprature=0; did you mean --temperature?" in usage_error(capsys, "generate", "a", "--temprature=0")
    assert usage_error(capsys, "generate", "a", "--zzz").rstrip().endswith("unrecognized arguments: --zzz")


def test_a_break_at_a_tensor_that_does_not_exist_is_an_error_before_anything_is_printed() -> None:
    for command in (("generate", "a frog"), ("logits", "--prompt", "a frog", "--output", "never.npz")):
        result = cli(*command, "--break", "Qcur-99")
        assert (result.code, result.out) == (2, "")
        assert "no such tensor: Qcur-99; this model has" in result.err
    assert not Path("never.npz").exists()


def test_prompts_come_from_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cli("generate", "a frog", *GREEDY)
    assert expected.code == 0
    (tmp_path / "prompt.txt").write_text("a frog", encoding="utf-8")

    def same(result: Result) -> None:
        assert (result.code, result.out) == (0, expected.out), result.err

    same(cli("generate", f"@{tmp_path / 'prompt.txt'}", *GREEDY))
    same(cli("generate", "--prompt", f"@{tmp_path / 'prompt.txt'}", *GREEDY))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a frog"))
    same(cli("generate", "-", *GREEDY))
    same(subprocess_cli("generate", *GREEDY, stdin=b"a frog"))
    assert "standard input is empty" in subprocess_cli("generate", *GREEDY, stdin=b"").err
    assert "missing.txt cannot be read" in cli("generate", f"@{tmp_path / 'missing.txt'}", *GREEDY).err
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in cli("generate", f"@{tmp_path / 'binary'}", *GREEDY).err


def test_what_is_no_gguf_file_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(model: object) -> str:
        return cli("inspect", "--model", model).error

    assert "give hf:me/some-model" in error("me/some-model")
    assert "is a directory without a GGUF file" in error(tmp_path)
    (tmp_path / "one.gguf").write_bytes(PACKAGED_MODEL.read_bytes())
    assert "is a directory: give one of its files, one.gguf" in error(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"x")
    assert "convert it with llama.cpp's convert_hf_to_gguf.py" in error(tmp_path / "m.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli("inspect", "--model", "~/one.gguf").code == 0


def test_a_context_beyond_the_models_is_a_warning() -> None:
    said = cli("generate", "a frog", "--ctx", "9999", *GREEDY).err
    assert "warning: --ctx 9999 is more than the 512 tokens that the model was trained for" in said
    assert "warning" not in cli("generate", "a frog", "--ctx", "400", *GREEDY).err


def test_pythonbreakpoint_is_honoured(tmp_path: Path) -> None:
    (tmp_path / "hook.py").write_text("def hit():\n    print('HOOK')\n", encoding="utf-8")
    command = ("generate", "a frog", *GREEDY, "--break", "Qcur-0")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT.get("PYTHONPATH", "")])
    hooked = subprocess_cli(*command, PYTHONPATH=path, PYTHONBREAKPOINT="hook.hit")
    assert (hooked.code, hooked.out.count("HOOK")) == (0, 2), hooked.err
    assert subprocess_cli(*command, PYTHONBREAKPOINT="0").code == 0
