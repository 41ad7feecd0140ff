"""The judge on a zoo of broken engines, on engines without fault, and on what is not comparable."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from refengine.errors import ModelError, RequestError, TraceError
from refengine.validate.dump import manifest_of, read_dump
from refengine.validate.judge import AGREES, DIVERGES, NOTHING_COMPARED, judge
from refengine.validate.run import validate
from tests.model_files import ModelFiles
from tests.validate.zoo import FAULTS, N_TOKENS, Fault, capture, config, layer, load, ops, swap


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_verdict_names_the_tensor_where_the_fault_sits_and_its_cause(fault: Fault, tiny_model: ModelFiles) -> None:
    broken, model = fault.models(tiny_model(fault.model))
    before = capture(model)
    outcome = validate(model, capture(broken))
    first = outcome.verdict.first_own_error
    assert outcome.verdict.exit_code == DIVERGES
    assert first is not None
    assert first.name == fault.expected
    assert (outcome.causes[:1] or (None,)) == (fault.cause,)
    # Trying hypotheses has changed nothing in our model.
    assert all(np.array_equal(v, before.tensors[n], equal_nan=True) for n, v in capture(model).tensors.items())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_verdict_on_a_dump_is_the_same(fault: Fault, tiny_model: ModelFiles, tmp_path: Path) -> None:
    broken, model = fault.models(tiny_model(fault.model))
    seen = capture(broken)
    manifest = manifest_of("an engine", seen.ids, seen.tensors, "t.safetensors")
    save_file({n: np.ascontiguousarray(v) for n, v in seen.tensors.items()}, tmp_path / "t.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    live, dumped = judge(model, seen), judge(model, read_dump(tmp_path))
    assert dumped.first_own_error is not None
    assert dumped.first_own_error.name == fault.expected
    assert repr(dumped.tensors) == repr(live.tensors)  # every figure; NaN too


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("positions off by one from token 17 on", "only at token 17 to 23"),
        ("one weight of the head", "only at column 0"),
        ("one swapped scale nibble in Q4_K", "only at column 0"),
        ("K cache stride", "only at column 23"),
        ("RoPE pairs halves", "only at token 1 to 23"),
        ("epsilon 1e-5 for 1e-6", ""),
    ],
)
def test_where_in_the_tensor_it_is_wrong(name: str, words: str, tiny_model: ModelFiles) -> None:
    fault = next(f for f in FAULTS if f.name == name)
    broken, model = fault.models(tiny_model(fault.model))
    assert validate(model, capture(broken)).where == words


HEALTHY = sorted({fault.model for fault in FAULTS})


@pytest.mark.parametrize("name", HEALTHY)
def test_an_engine_without_fault_agrees(name: str, tiny_model: ModelFiles) -> None:
    model = load(tiny_model(name), name)
    verdict = judge(load(tiny_model(name), name), capture(model))
    assert verdict
    assert verdict.exit_code == AGREES
    assert verdict.first_own_error is None
    assert verdict.missing == verdict.unknown == ()
    assert verdict.logits is not None
    assert verdict.logits.kl_max < 1e-12


def test_an_inherited_error_is_not_blamed_on_those_who_inherit(tiny_model: ModelFiles) -> None:
    """A fault in layer 0 alone: everything after it is far off in total and right by itself."""
    name = "llama-q8_0"
    broken = load(tiny_model(name), name)
    layer(0, swap("ffn_gate", "ffn_up"))(broken)
    verdict = judge(load(tiny_model(name), name), capture(broken))
    assert [t.name for t in verdict.tensors if t.own_error] == ["ffn_up-0", "ffn_gate-0"]
    after = [t for t in verdict.tensors if t.name.endswith("-1")]
    assert len(after) > 10
    assert all(t.total.nmse > 1e-6 > t.threshold >= t.local.nmse for t in after)


def test_nan_of_the_other_engine_is_an_own_error_where_it_first_appears(tiny_model: ModelFiles) -> None:
    name = "llama-f32"
    broken = load(tiny_model(name), name)
    silu = ops(start=1, swiglu=lambda right, g, u: np.where(np.arange(g.shape[1]) == 5, np.nan, right(g, u)))
    silu(broken)
    verdict = judge(load(tiny_model(name), name), capture(broken))
    assert verdict.first_own_error is not None
    assert verdict.first_own_error.name == "ffn_swiglu-1"
    assert verdict.first_own_error.local.nonfinite_mismatches == N_TOKENS


def test_a_partial_capture_is_judged_by_what_it_has(tiny_model: ModelFiles) -> None:
    name = "llama-f32"
    model = load(tiny_model(name), name)
    whole = capture(model)
    part = replace(whole, tensors={n: whole.tensors[n] for n in ("l_out-0", "l_out-1")} | {"scratch": np.zeros(3)})
    verdict = judge(model, part)
    assert [t.name for t in verdict.tensors] == ["l_out-0", "l_out-1"]
    assert verdict.unknown == ("scratch",)
    assert verdict.missing[0] == "embd"
    assert verdict.logits is None
    assert verdict.exit_code == AGREES


def test_nothing_compared_is_not_agreement(tiny_model: ModelFiles) -> None:
    model = load(tiny_model("llama-f32"), "llama-f32")
    verdict = judge(model, replace(capture(model), tensors={"my_tensor": np.zeros(3)}))
    assert not verdict
    assert verdict.exit_code == NOTHING_COMPARED


def test_what_does_not_belong_together_is_refused(tiny_model: ModelFiles) -> None:
    model = load(tiny_model("llama-f32"), "llama-f32")
    seen = capture(model)
    with pytest.raises(ModelError, match="another model file"):
        judge(model, replace(seen, model_sha256="ab" * 32), model_sha256="cd" * 32)
    with pytest.raises(RequestError, match="token id 999999"):
        judge(model, replace(seen, ids=[999999]))
    with pytest.raises(TraceError, match="l_out-0"):
        judge(model, replace(seen, tensors={"l_out-0": np.zeros((N_TOKENS, 7), np.float32)}))
    with pytest.raises(RequestError, match="not a regular expression"):
        judge(model, seen, tolerances=[("(", 1.0)])


def test_a_tolerance_of_the_user_replaces_the_measured_one(tiny_model: ModelFiles) -> None:
    name = "qwen2-f32"
    broken = load(tiny_model(name), name)
    config(norm_eps=1e-5)(broken)
    seen = capture(broken)
    assert judge(load(tiny_model(name), name), seen, tolerances=[("norm", 1e-3)])
    verdict = judge(load(tiny_model(name), name), seen, tolerances=[("norm", 1e-3), ("^attn_norm-1$", 0.0)])
    assert verdict.first_own_error is not None
    assert verdict.first_own_error.name == "attn_norm-1"
