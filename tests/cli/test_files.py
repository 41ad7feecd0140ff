"""What `logits` and `trace` write, and that a run that fails writes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import refengine
from refengine.cli import console
from refengine.validate.capture import sha256_of_file
from refengine.validate.dump import read_dump
from tests.cli_runner import cli, write_llama, write_no_vocab
from tests.model_files import float_bytes, read_floats, rewrite, split


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def no_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_no_vocab(tmp_path_factory.mktemp("cli"))


# ---- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numerics", "dtype"), [("exact", "float32"), ("exact64", "float64"), ("llamacpp", "float32")])
def test_logits_file(llama: Path, tmp_path: Path, numerics: str, dtype: str) -> None:
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


def test_logits_without_vocabulary(no_vocab: Path, tmp_path: Path) -> None:
    assert cli("logits", "--ids", "[3, 5, 96]", "--model", no_vocab, "--output", tmp_path / "x.npz").code == 0
    with np.load(tmp_path / "x.npz") as data:
        assert data["ids"].tolist() == [3, 5, 96]
        assert data["logits"].shape == (3, 97)


def test_split_file_loads_as_one(llama: Path, tmp_path: Path) -> None:
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
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    message: str,
) -> None:
    monkeypatch.setattr(console, "load", fail_if_loaded)
    assert message in cli(command, "--ids", "1", "--model", llama, "--output", tmp_path / name).error


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_interrupted_write_leaves_nothing(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def half(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise error

    def half_file(tensors: Any, path: str) -> None:
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


# ---- trace ----------------------------------------------------------------------------------------------------------


def test_trace_file_and_manifest(llama: Path, tmp_path: Path) -> None:
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
        "kq-0@0": ("kq-0@0", None, None, [cfg.n_head, 3, 3]),
        "kq-0@1": ("kq-0@1", None, None, [cfg.n_head, rest, len(ids)]),
        "result_norm": ("result_norm", None, None, [len(ids), cfg.n_embd]),
    }
    listed = {t["key"]: (t["name"], t["layer"], t["occurrence"], t["shape"]) for t in manifest["tensors"]}
    assert listed == expected
    assert manifest["ids"] == ids
    flags = {"model": llama.name, "arch": "llama", "kv_type": "float32", "device": "cpu"}
    assert (manifest["numerics"], manifest["flags"]) == ("exact", flags)
    assert manifest["model_sha256"] == sha256_of_file(llama)
    with safe_open(output, framework="numpy") as tensors:
        assert set(tensors.keys()) == set(expected)
        for entry in manifest["tensors"]:
            assert list(tensors.get_tensor(entry["key"]).shape) == entry["shape"]
        trace = refengine.Trace("^Qcur-0$")
        model.forward(ids, trace=trace, chunk=3)
        np.testing.assert_array_equal(tensors.get_tensor("Qcur-0"), trace.result()["Qcur-0"])
    assert set(read_dump(tmp_path / "x.manifest.json").tensors) == set(expected)  # it is a dump like any engine's
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.manifest.json", "x.safetensors"]


def test_trace_list_prints_every_name(llama: Path) -> None:
    result = cli("trace", "--ids", "1,2,3", "--model", llama, "--list")
    assert result.code == 0
    trace = refengine.Trace("")
    refengine.load(llama).forward([1, 2, 3], trace=trace)
    assert [line.split()[0] for line in result.out.splitlines()] == list(trace.result())
    line = next(line for line in result.out.splitlines() if line.startswith("kq-0 "))
    assert line.split()[1:3] == ["6x3x3", "float32"]
    assert len(cli("trace", "--ids", "1", "--model", llama, "--list", "--filter", "^l_out").out.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "logits", "trace"])
def test_watch_names_the_first_bad_tensor(llama: Path, tmp_path: Path, command: str) -> None:
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
