"""refengine against llama.cpp's recorded logits and tensors: runs where llama.cpp is not installed."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import refengine
from refengine.validate.capture import LOGITS, Capture
from refengine.validate.dump import read_dump
from refengine.validate.metrics import nmse
from tools.haiku.specs import DENSE
from tools.make_golden import GOLDEN, MODELS, SEED, ids_of, model_file
from tools.make_model import TINY, write_spec


@pytest.fixture(params=MODELS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Capture]:
    folder = GOLDEN / request.param
    return model_file(request.param, tmp_path), read_dump(folder)


def run(path: Path, golden: Capture, numerics: str) -> dict[str, np.ndarray]:
    model = refengine.load(path, numerics=numerics, kv_type=golden.flags["kv_type"])
    trace = refengine.Trace("^(l_out|kqv_out)-|^result_(norm|output)$")
    model.forward(golden.ids, trace=trace)
    return trace.result()


def test_golden_belongs_to_the_model(golden: tuple[Path, Capture]) -> None:
    path, dump = golden
    assert dump.flags["model_seed"] == SEED
    assert hashlib.sha256(path.read_bytes()).hexdigest() == dump.model_sha256
    assert dump.ids == ids_of(path)
    assert load_file(dump.source.parent / "golden.safetensors").keys() == dump.tensors.keys()


def test_golden_agrees(golden: tuple[Path, Capture]) -> None:
    path, dump = golden
    is_f32 = dump.flags["kv_type"] == "f32"
    is_gpt2 = dump.flags["model"].startswith("gpt2")
    ours = run(path, dump, "exact" if is_f32 and not is_gpt2 else "llamacpp")
    assert ours.keys() == dump.tensors.keys()  # a missing or an extra tensor fails
    for name, theirs in dump.tensors.items():
        assert ours[name].shape == theirs.shape, name
        # float32: another order of sums (test_parity_llamacpp.py). gpt2: flips at its float16 GELU table, 1e-9.
        # Quantised: rounding flips that spread, 1e-8 to 3e-4; here only gross errors can show.
        tolerance = 1e-3 if not is_f32 else 1e-7 if is_gpt2 else 1e-11
        assert nmse(ours[name], theirs) <= tolerance, name


def test_golden_control_a_wrong_seed_disagrees(golden: tuple[Path, Capture], tmp_path: Path) -> None:
    _, dump = golden
    other = tmp_path / "other.gguf"
    # For the packaged model, random weights of its shape.
    spec = TINY.get(dump.flags["model"]) or replace(DENSE, type="Q4_K_M")
    write_spec(other, spec, SEED + 1)
    assert nmse(run(other, dump, "exact")[LOGITS], dump.tensors[LOGITS]) > 0.1


def test_every_golden_folder_is_tested() -> None:
    assert {p.name for p in GOLDEN.iterdir() if p.is_dir()} == {*MODELS, "perf"}
    assert all(np.isfinite(v).all() for m in MODELS for v in load_file(GOLDEN / m / "golden.safetensors").values())
