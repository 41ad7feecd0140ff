"""The commands, as a user types them: what they write, where, and how they fail."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import refengine
from refengine.cli import main
from refengine.commands import parse_ids

COMMANDS = ("generate", "logits", "trace", "tokenize", "inspect")


@pytest.fixture
def model(tiny_model):
    return str(tiny_model("llama-q8_0"))


def test_logits_file_holds_ids_and_logits(model, tmp_path, capsys):
    output = tmp_path / "x.npz"
    assert main(["logits", "--model", model, "--ids", "1,5,9", "--output", str(output)]) == 0
    written = np.load(output)
    assert written["ids"].tolist() == [1, 5, 9]
    expected = refengine.load(model).forward([1, 5, 9])
    np.testing.assert_array_equal(written["logits"], expected)
    assert written["logits"].dtype == np.float32
    assert capsys.readouterr().out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_trace_file_and_manifest_agree(model, tmp_path):
    output = tmp_path / "t.safetensors"
    assert main(["trace", "--model", model, "--ids", "1,5,9", "--filter", "^Qcur-[01]", "--output", str(output)]) == 0
    tensors = load_file(output)
    manifest = json.loads((tmp_path / "t.manifest.json").read_text())
    assert set(tensors) == {"Qcur-0#0", "Qcur-0", "Qcur-1#0", "Qcur-1"}
    assert {e["name"]: tuple(e["shape"]) for e in manifest["tensors"]} == {k: v.shape for k, v in tensors.items()}
    assert [(e["tensor"], e["layer"], e["occurrence"]) for e in manifest["tensors"][:2]] == [
        ("Qcur", 0, 0),
        ("Qcur", 0, None),
    ]
    assert manifest["ids"] == [1, 5, 9]
    assert len(manifest["model_sha256"]) == 64


def test_trace_list_prints_names(model, capsys):
    assert main(["trace", "--model", model, "--ids", "1,2", "--list", "--filter", "l_out"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["l_out-0", "l_out-1", "l_out-2"]


def test_same_seed_same_text(model, capsys):
    texts = []
    for seed in ("7", "7", "8"):
        assert main(["generate", "the", "--model", model, "--max-tokens", "12", "--seed", seed]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert f"seed {seed}" in captured.err
    assert texts[0] == texts[1] != texts[2]


def test_echo_prints_the_prompt(model, capsys):
    arguments = ["generate", "the", "--model", model, "--max-tokens", "4", "--temperature", "0"]
    assert main([*arguments, "--echo"]) == 0
    echoed = capsys.readouterr().out
    assert main([*arguments, "--no-echo"]) == 0
    assert echoed == "the" + capsys.readouterr().out


def test_chat_template_is_applied(tiny_model, capsys):
    path = str(tiny_model("qwen2-q8_0"))
    assert main(["generate", "hi", "--model", path, "--max-tokens", "2", "--temperature", "0"]) == 0
    with_template = capsys.readouterr().err
    assert main(["generate", "hi", "--model", path, "--max-tokens", "2", "--temperature", "0", "--no-chat"]) == 0
    without = capsys.readouterr()
    assert without.out.startswith("hi")
    prompt_tokens = [int(err.split("prompt ")[1].split()[0]) for err in (with_template, without.err)]
    assert prompt_tokens[0] > prompt_tokens[1]


def test_tokenize_round_trip(model, capsys):
    assert main(["tokenize", "--model", model, "the thing"]) == 0
    ids = json.loads(capsys.readouterr().out)
    assert main(["tokenize", "--model", model, "--decode", json.dumps(ids[1:])]) == 0
    assert capsys.readouterr().out == "the thing\n"


def test_inspect_json_counts_the_tensors(model, capsys):
    assert main(["inspect", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quant_kind"] == "Q8_0"
    assert found["runs_here"] == "yes"
    assert sum(t["tensors"] for t in found["types"].values()) == len(found["tensors"])
    assert main(["inspect", "--model", model]) == 0
    assert "general.architecture = 'llama'" in capsys.readouterr().out


def test_a_model_without_vocabulary_takes_ids(tiny_model, capsys):
    path = str(tiny_model("llama-f32-no-vocab"))
    assert main(["generate", "--ids", "3,4", "--model", path, "--max-tokens", "3", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    assert main(["generate", "text", "--model", path]) == 2
    assert "no vocabulary" in capsys.readouterr().err


WRONG = {
    "missing file": (["generate", "x", "--model", "nowhere.gguf"], "nowhere.gguf"),
    "two prompts": (["generate", "x", "--ids", "1", "--model", "M"], "once"),
    "no prompt": (["generate", "--model", "M"], "once"),
    "bad ids": (["generate", "--ids", "1,x", "--model", "M"], "token ids"),
    "empty ids": (["generate", "--ids", "", "--model", "M"], "empty"),
    "id out of range": (["generate", "--ids", "1,99999", "--model", "M"], "99999"),
    "negative id": (["generate", "--ids", "-1", "--model", "M"], "-1"),
    "temperature": (["generate", "x", "--model", "M", "--temperature", "3"], "temperature"),
    "nan": (["generate", "x", "--model", "M", "--temperature", "nan"], "temperature"),
    "device": (["generate", "x", "--model", "M", "--device", "tpu"], "tpu"),
    "no output folder": (["logits", "--ids", "1", "--model", "M", "--output", "no/such/x.npz"], "no/such"),
    "output suffix": (["logits", "--ids", "1", "--model", "M", "--output", "x.txt"], ".npz"),
    "nothing matches": (["trace", "--ids", "1", "--model", "M", "--list", "--filter", "nope"], "nope"),
    "bad filter": (["trace", "--ids", "1", "--model", "M", "--list", "--filter", "("], "regular expression"),
    "unknown break": (["logits", "--ids", "1", "--model", "M", "--output", "x.npz", "--break", "Zcur-0"], "Zcur-0"),
    "too long for --ctx": (["generate", "--ids", "1,2,3", "--model", "M", "--ctx", "2"], "context"),
    "chunk": (["generate", "--ids", "1", "--model", "M", "--chunk", "0"], "chunk"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(case, model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = WRONG[case]
    assert main([model if a == "M" else a for a in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("refengine: error: ")
    assert expected in errors[0]
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("cut", [0, 3, 30, 500, 5000])
def test_a_malformed_file_gives_one_line_and_no_traceback(model, tmp_path, cut):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(model).read_bytes()[:cut])
    done = subprocess.run(
        [sys.executable, "-m", "refengine", "inspect", str(broken)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("refengine: error: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_gives_no_traceback(model):
    command = f"{sys.executable} -m refengine inspect {model} --json | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("command", [(), *[(c,) for c in COMMANDS]])
def test_help_exits_with_0(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "usage: refengine" in out
    assert "(default: None)" not in out


def test_break_opens_pdb_in_the_model_file(model, tmp_path):
    """A real pdb session: it stops in the forward pass, and the tensor is there to look at."""
    command = [sys.executable, "-m", "refengine", "logits", "--model", model, "--ids", "1,5,9", "--break", "Qcur-1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "x.npz")],
        input="p Qcur.shape\np il\nc\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "models/llama.py" in done.stdout
    assert "(3, 6, 16)" in done.stdout
    assert done.returncode == 0, done.stderr


def test_ids_are_read_in_three_forms():
    assert parse_ids("1,2,3") == parse_ids("[1, 2, 3]") == parse_ids(" 1 2 3\n") == [1, 2, 3]
