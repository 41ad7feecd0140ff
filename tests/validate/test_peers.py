"""The other engine by its name: refengine under other settings, and llama.cpp in micro-batches."""

import numpy as np
import pytest

import refengine
from refengine.errors import RequestError
from refengine.validate.judge import judge
from refengine.validate.peers import capture_peer, default_ids
from tests.cli_runner import cli
from tests.model_files import ModelFiles


def test_refengine_itself_under_the_same_settings_is_bit_equal(tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model("gpt-oss-q8_0"), numerics="llamacpp")
    capture = capture_peer("refengine", model, [4, 5, 6, 7])
    assert (capture.numerics, capture.flags) == ("llamacpp", {"device": "cpu", "kv_type": "float16"})
    verdict = judge(model, capture)
    assert verdict
    assert all(t.local.nmse == t.total.nmse == 0.0 for t in verdict.tensors)


def test_float64_agrees_with_float32_where_no_rounding_is_done_between(tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model("qwen3-q4_k_m"), numerics="exact")
    verdict = judge(model, capture_peer("refengine:exact64", model, list(range(1, 25))))
    assert verdict, verdict.first_own_error
    assert max(t.total.nmse for t in verdict.tensors) > 0.0


def test_another_profile_diverges_at_its_first_rounding(tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model("llama-q8_0"), numerics="exact")
    first = judge(model, capture_peer("refengine:llamacpp,f32", model, list(range(1, 25)))).first_own_error
    assert first is not None
    assert first.name == "Qcur-0#0"


def test_an_unknown_setting_is_named(tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model("llama-f32"))
    with pytest.raises(
        RequestError, match=r"unknown setting 'exact32'; choose among exact, exact64, llamacpp, fast, f16"
    ):
        capture_peer("refengine:cpu,exact32", model, [1])
    with pytest.raises(RequestError, match="token id 99999"):
        capture_peer("refengine", model, [99999])


def test_the_command_takes_itself_as_a_peer(tiny_model: ModelFiles) -> None:
    result = cli("validate", "--model", tiny_model("phi3-f32"), "--numerics", "exact", "--peer", "refengine:exact64")
    assert result.code == 0, result.err
    assert result.out.startswith("AGREES: ")
    assert "refengine 0.1.0 had" in result.out


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["llama-f32", "gpt-oss-mxfp4_moe", "qwen2-q4_k_m"])
def test_llamacpp_in_micro_batches_agrees(name: str, tiny_model: ModelFiles) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    kv_type = "f32" if name == "llama-f32" else "f16"
    model = refengine.load(tiny_model(name), numerics="llamacpp", kv_type=kv_type)
    ids = np.random.default_rng(2).integers(0, model.config.n_vocab, 40).tolist()
    capture = capture_peer("llama.cpp", model, ids, n_ubatch=16)
    verdict = judge(model, capture)
    assert verdict, verdict.first_own_error
    # What later tokens' keys give is not there in an early micro-batch.
    assert {n.partition("-")[0] for n in verdict.missing} >= {"kq"}
    assert {"kq_soft_max-1", "kqv-1", "Qcur-0", "result_output"} <= {t.name for t in verdict.tensors}
    assert verdict.logits is not None
    assert len(verdict.logits.kl) == 40


@pytest.mark.llamacpp
def test_a_micro_batch_of_nothing_is_refused(tiny_model: ModelFiles) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    result = cli("validate", "--model", tiny_model("llama-f32"), "--kv-type", "f32", "--ubatch", "0")
    assert result.code == 2
    assert "micro-batch of 0 tokens must be 1 to" in result.err


def test_a_model_without_vocabulary_has_a_default_prompt(tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model("llama-f32"))
    assert len(default_ids(model)) >= 20
