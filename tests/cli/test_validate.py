"""`refengine validate`: a dump that is right, one that is wrong, one with nothing in it; and llama.cpp live."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refengine.validate.capture import sha256_of_file
from refengine.validate.llamacpp import repack_crashes
from tests.cli_runner import cli

PROMPT = "an ox and the other one"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.make_model import TINY, write_spec

    path = tmp_path_factory.mktemp("validate") / "m.gguf"
    write_spec(path, TINY["qwen2-q4_k_m"])
    return path


@pytest.fixture
def dump(model: Path, tmp_path: Path) -> Path:
    """What `refengine trace` writes is a dump; this one is of the profile that llama.cpp's tensors are judged by."""
    output = tmp_path / "d.safetensors"
    assert cli("trace", "--prompt", PROMPT, "--model", model, "--numerics", "llamacpp", "--output", output).code == 0
    return tmp_path / "d.manifest.json"


def change(dump: Path, **tensors: Any) -> None:
    """Rewrite tensors of a dump by functions of their values; None takes one out."""
    path = dump.parent / "d.safetensors"
    values = load_file(path)
    manifest = json.loads(dump.read_text())
    for name, function in tensors.items():
        if function is not None:
            values[name.replace("_at_", "-")] = function(values[name.replace("_at_", "-")])
    save_file(values, path)
    gone = {name.replace("_at_", "-") for name, function in tensors.items() if function is None}
    manifest["tensors"] = [t for t in manifest["tensors"] if t["key"] not in gone]
    dump.write_text(json.dumps(manifest))


def test_a_right_dump_agrees(model: Path, dump: Path) -> None:
    result = cli("validate", "--model", model, "--peer", dump)
    assert result.code == 0
    assert result.out.startswith("AGREES: 66 tensors")
    assert "same likeliest token at 100.0%" in result.out


def test_a_wrong_tensor_is_named_and_the_json_has_the_same_figures(model: Path, dump: Path, tmp_path: Path) -> None:
    def one_off(value: np.ndarray) -> np.ndarray:
        value[2, 1, 7] += 0.5
        return value

    change(dump, Kcur_at_1=one_off, attn_out_at_0=None)
    output = tmp_path / "verdict.json"
    result = cli("validate", "--model", model, "--peer", dump, "--json", output, "--all")
    assert result.code == 1
    assert result.out.startswith("DIVERGES: Kcur-1 is the first tensor with an error of its own")
    assert "worst at (2, 1, 7)" in result.out
    assert "1 of our tensors were not captured: attn_out-0" in result.out
    found = json.loads(output.read_text())
    assert (found["schema"], found["verdict"], found["first_own_error"]) == ("refengine-verdict", "diverges", "Kcur-1")
    assert found["facts"]["model_sha256"] == sha256_of_file(model)
    tensor = next(t for t in found["tensors"] if t["name"] == "Kcur-1")
    assert tensor["own_error"]
    assert tensor["local"]["worst"] == [2, 1, 7]
    assert f"{tensor['local']['nmse']:.1e}" in result.out
    # The scores were computed from the right K, not from the one that stands here: they do not follow from it.
    assert [t["name"] for t in found["tensors"] if t["own_error"]] == ["Kcur-1", "kq-1"]


def test_a_known_mistake_is_named(model: Path, dump: Path, tmp_path: Path) -> None:
    """The dump of an engine that forgot the bias of V in layer 1 (and went on with that)."""
    from refengine import load
    from refengine.trace import Trace

    broken = load(model, numerics="llamacpp")
    broken.weights.layers[1].attn_v_bias = broken.weights.layers[1].attn_v_bias * 0
    trace = Trace("")
    broken.forward(json.loads(dump.read_text())["ids"], trace=trace)
    save_file({n: np.ascontiguousarray(v) for n, v in trace.result().items()}, dump.parent / "d.safetensors")
    output = tmp_path / "verdict.json"
    result = cli("validate", "--model", model, "--peer", dump, "--json", output)
    assert result.code == 1
    assert result.out.startswith("DIVERGES: Vcur-1 is the first")
    assert "it is what comes out if the bias attn_v.bias is missing" in result.out
    assert json.loads(output.read_text())["causes"] == ["the bias attn_v.bias is missing"]


def test_nothing_compared_is_exit_code_3(model: Path, dump: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.yaml"
    names.write_text("- ['(.*)', 'mine_\\1']\n")
    result = cli("validate", "--model", model, "--peer", dump, "--names", names)
    assert result.code == 3
    assert result.out.startswith("NOTHING COMPARED: refengine")
    assert "mine_embd" in result.out


def test_a_dump_of_another_model_is_refused_unless_waived(model: Path, dump: Path) -> None:
    manifest = json.loads(dump.read_text())
    dump.write_text(json.dumps({**manifest, "model_sha256": "00" * 32}))
    result = cli("validate", "--model", model, "--peer", dump)
    assert result.code == 2
    assert "another model file (sha256 000000000000" in result.err
    assert cli("validate", "--model", model, "--peer", dump, "--any-model").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--peer", "nowhere"), "a dump is a folder with manifest.json"),
        (("--tolerance", "norm"), "--tolerance norm: write EXPRESSION=NMSE"),
        (("--tolerance", "norm=-1"), "write EXPRESSION=NMSE"),
        (("--tolerance", "(=1"), "not a regular expression"),
        (("--prompt", "x"), "a dump contains its prompt"),
        (("--json", "out.txt"), "must end in .json"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments: tuple[str, ...], words: str, model: Path, dump: Path) -> None:
    given = arguments if "--peer" in arguments else ("--peer", str(dump), *arguments)
    result = cli("validate", "--model", model, *given)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


@pytest.mark.llamacpp
@pytest.mark.parametrize("arguments", [(), ("--ids", "5,42,79,116"), ("--kv-type", "f32", "an ox")])
def test_llamacpp_live_agrees(arguments: tuple[str, ...], model: Path) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    result = cli("validate", "--model", model, *arguments)
    assert result.code == 0, result.out + result.err
    assert result.out.startswith("AGREES: 63 tensors, each on the inputs that llama.cpp")


@pytest.mark.llamacpp
def test_llamacpp_with_repacked_weights_agrees_or_is_refused(model: Path) -> None:
    """Which of the two depends on the processor and the compiler of llama.cpp."""
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    result = cli("validate", "--model", model, "--repack")
    if repack_crashes(model):
        assert result.code == 2
        assert "llama.cpp crashes with repacked weights on this processor" in result.err.splitlines()[-1]
    else:
        assert result.code == 0, result.out + result.err
        assert result.out.startswith("AGREES: 63 tensors, each on the inputs that llama.cpp")


@pytest.mark.parametrize(
    ("trial", "crashes"),
    [("import os; os.abort()", True), ("raise SystemExit(1)", False), ("import os; os.kill(os.getpid(), 9)", False)],
)
def test_only_a_crash_speaks_against_repacked_weights(
    trial: str, crashes: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refengine.validate.llamacpp._TRIAL", trial)
    assert repack_crashes(model) == crashes


@pytest.mark.llamacpp
def test_llamacpp_under_the_wrong_profile_diverges_at_the_first_rounded_product(model: Path) -> None:
    """The control: `exact` does not round activations as llama.cpp does, and the verdict says where that begins."""
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    result = cli("validate", "--model", model, "--numerics", "exact", "--kv-type", "f16")
    assert result.code == 1
    assert result.out.startswith("DIVERGES: Qcur-0#0 is the first")
