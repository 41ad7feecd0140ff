"""The kernels beside llama.cpp: nearer to what the file means, and without an error of their own."""

from pathlib import Path
from typing import Any

import pytest

import refengine
from refengine.errors import DeviceError
from refengine.validate.judge import judge
from refengine.validate.peers import capture_peer
from tests.levels import ci_only, mostly_in_ci
from tests.model_files import ModelFiles
from tools.make_model import IN_LLAMACPP, ONE_EACH, TINY
from tools.report_parity import kernel_errors

QUANTISED = [name for name in IN_LLAMACPP if TINY[name].type not in ("F32", "F16", "BF16")]


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", QUANTISED)
def test_kernels_are_nearer_to_exact_than_llamacpp_is(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `validate`)")
    found = kernel_errors(name, "host", tmp_path, 1)
    for ours, theirs in zip(found["kernels"], found["llamacpp"], strict=True):
        assert ours < theirs, found


# Every architecture, every type of weights, and a prompt of more than one tile of positions.
JUDGED = ["llama-f32", "llama-f16", "llama-bf16", "llama-q4_1", "llama-q5_k", "llama-mxfp4", "gpt-oss-q8_0"]


@pytest.mark.parametrize("name", [*mostly_in_ci(ONE_EACH), *ci_only(JUDGED, JUDGED)])
def test_the_judge_finds_no_error_of_the_kernels(name: str, place: str, tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model(name), numerics="fast")
    try:
        capture = capture_peer(f"refengine:{place}", model)
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")
    verdict = judge(model, capture)
    assert verdict, verdict.first_own_error
    assert "kqv_out-0" in {t.name for t in verdict.tensors}
    assert not verdict.unknown


def test_the_judge_finds_a_fault_in_a_kernel(tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in ten thousand on the attention's scale: far below what the profile itself rounds away."""
    from refengine.cuda.ops import KernelOps

    right = KernelOps.attention

    def wrong(self: Any, *given: Any, scale: float, **named: Any) -> Any:
        return right(self, *given, scale=scale * 1.0001, **named)

    monkeypatch.setattr(KernelOps, "attention", wrong)
    model = refengine.load(tiny_model("qwen3-q4_k_m"), numerics="fast")
    verdict = judge(model, capture_peer("refengine:host", model))
    assert verdict.first_own_error is not None
    assert verdict.first_own_error.name.startswith("kqv-")
