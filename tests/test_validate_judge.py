"""A zoo of broken engines: each is our own engine with one fault; the verdict must name the tensor where it sits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refengine
from refengine.errors import ModelError, RequestError, TraceError
from refengine.model import Model
from refengine.ops import Ops
from refengine.validate.capture import Capture
from refengine.validate.causes import likely_causes
from refengine.validate.judge import AGREES, DIVERGES, NOTHING_COMPARED, judge
from tools.make_model import TINY

N_TOKENS = 24


def load(path: Path, name: str) -> Model:
    return refengine.load(path, numerics="llamacpp", kv_type="f32" if TINY[name].type == "F32" else "f16")


def capture(model: Model, source: Path = Path("engine"), record: str = "") -> Capture:
    """What this engine's tensors are: of our model, or of a broken one."""
    ids = np.random.default_rng(3).integers(0, model.config.n_vocab, N_TOKENS).tolist()
    trace = refengine.Trace(record)
    model.forward(ids, trace=trace)
    return Capture(source, "an engine", ids, trace.result())


class Broken(Ops):
    """Operations of which `fault` replaces some, from its `start`th call on."""

    def __init__(self, ops: Ops, fault: dict[str, Callable[..., Any]], start: int = 0) -> None:
        super().__init__(ops.xp, ops.numerics, ops.cache.budget)
        for name, broken in fault.items():
            setattr(self, name, partial(self._call, getattr(ops, name), broken, start))
        self._calls = 0

    def _call(self, right: Callable[..., Any], broken: Callable[..., Any], start: int, *args: Any, **kwargs: Any):
        self._calls += 1
        return right(*args, **kwargs) if self._calls <= start else broken(right, *args, **kwargs)


def ops(start: int = 0, **fault: Callable[..., Any]) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.ops = Broken(model.ops, fault, start)

    return apply


def config(**changes: Any) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.config = replace(model.config, **changes)

    return apply


def rope(**changes: Any) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.config = replace(model.config, rope=replace(model.config.rope, **changes))

    return apply


def layer(il: int, change: Callable[[Any], None]) -> Callable[[Model], None]:
    return lambda model: change(model.weights.layers[il])


def set_zero(attribute: str) -> Callable[[Any], None]:
    return lambda weights: setattr(weights, attribute, np.zeros_like(getattr(weights, attribute)))


def swap(a: str, b: str) -> Callable[[Any], None]:
    def apply(weights: Any) -> None:
        first, second = getattr(weights, a), getattr(weights, b)
        # The names stay: they are what the cache of dequantised weights goes by.
        setattr(weights, a, replace(second, name=first.name))
        setattr(weights, b, replace(first, name=second.name))

    return apply


def matrix_bytes(attribute: str, change: Callable[[np.ndarray], None]) -> Callable[[Any], None]:
    def apply(weights: Any) -> None:
        matrix = getattr(weights, attribute)
        data = np.array(matrix.data)
        change(data)
        setattr(weights, attribute, replace(matrix, data=data))

    return apply


def swap_first_scale_nibbles(data: np.ndarray) -> None:
    """Of the first Q4_K block, after d and dmin (4 bytes) in its 12 bytes of scales: low bits of a scale and a minimum.

    Byte 13 has those of sub-block 5, which are unlike in this model.
    """
    assert data[13] >> 4 != data[13] & 15
    data[13] = (data[13] >> 4) | ((data[13] & 15) << 4)


def transpose(weights: Any) -> None:
    matrix = weights.attn_output
    n = matrix.shape[0]
    values = np.ascontiguousarray(np.asarray(matrix.data).view(np.float32).reshape(n, n).T)
    weights.attn_output = replace(matrix, data=values.view(np.uint8).reshape(-1))


def interleaved_heads(right: Any, Qcur: Any, k_cache: Any, v_cache: Any, *args: Any, **kwargs: Any) -> Any:
    """Query head h reads K/V head h % n_head_kv instead of h // (n_head / n_head_kv)."""
    group = (1, 1, Qcur.shape[1] // k_cache.shape[2], 1)
    return right(Qcur, np.tile(k_cache, group), np.tile(v_cache, group), *args, **kwargs)


def shifted_positions(right: Any, positions: np.ndarray, *args: Any) -> Any:
    return right(np.where(positions >= 17, positions + 1, positions), *args)


def without(**fixed: Any) -> Callable[..., Any]:
    return lambda right, *args, **kwargs: right(*args, **{**kwargs, **fixed})


def stale_slot(right: Any, cache: np.ndarray, new: np.ndarray, slots: np.ndarray) -> None:
    """The last row is written one slot too far: a wrong stride."""
    right(cache, new, np.append(slots[:-1], slots[-1] + 1))


@dataclass(frozen=True)
class Fault:
    name: str
    model: str
    apply: Callable[[Model], None]
    expected: str


FAULTS = [
    Fault("epsilon 1e-5 for 1e-6", "qwen2-f32", config(norm_eps=1e-5), "attn_norm-0"),
    Fault("epsilon 1e-6 for 1e-5", "llama-q4_0", config(norm_eps=1e-6), "attn_norm-0"),
    Fault("RoPE pairs neighbours", "qwen2-q8_0",
          ops(rope_neox=lambda right, x, a: refengine.ops.rope.rope_norm(np, x, *a)), "Qcur-0"),
    Fault("RoPE pairs halves", "llama-q5_k",
          ops(rope_norm=lambda right, x, a: refengine.ops.rope.rope_neox(np, x, *a)), "Qcur-0"),
    Fault("RoPE base 1e4 for 1e6", "qwen3-q4_k_m", rope(freq_base=1e4), "Qcur-0"),
    Fault("RoPE not applied to K of layer 1", "llama-f32",
          ops(start=3, rope_norm=lambda right, x, a: x), "Kcur-1"),
    Fault("positions off by one from token 17 on", "qwen2-q4_k_m", ops(rope_angles=shifted_positions), "Qcur-0"),
    Fault("no YaRN", "gpt-oss-f32", rope(ext_factor=0.0), "Qcur-0"),
    Fault("interleaved K/V heads", "llama-f32", ops(attention=interleaved_heads), "kq-0"),
    Fault("no 1/sqrt(d) in layer 1", "qwen2-f32", ops(start=1, attention=without(scale=1.0)), "kq_soft_max-1"),
    Fault("sliding window off by one", "gpt-oss-mxfp4_moe", config(n_swa=TINY["gpt-oss-mxfp4_moe"].n_swa + 1),
          "kq_soft_max-0"),
    Fault("no sinks", "gpt-oss-q8_0", ops(attention=without(sinks=None)), "kq_soft_max-0"),
    Fault("K cache stride", "phi3-q4_k_m", ops(kv_append=stale_slot), "kq-0"),
    Fault("V cache stride in layer 1", "llama-f32", ops(start=3, kv_append=stale_slot), "kqv-1"),
    Fault("no bias on Q of layer 1", "qwen2-q4_k_m", layer(1, set_zero("attn_q_bias")), "Qcur-1#1"),
    Fault("no bias on V of layer 0", "qwen2-f32", layer(0, set_zero("attn_v_bias")), "Vcur-0"),
    Fault("transposed output projection", "llama-f32", layer(1, transpose), "attn_out-1"),
    Fault("gate and up swapped", "llama-q4_0", layer(1, swap("ffn_gate", "ffn_up")), "ffn_up-1"),
    Fault("K and V swapped", "llama-q8_0", layer(0, swap("attn_k", "attn_v")), "Kcur-0#0"),
    Fault("one swapped scale nibble in Q4_K", "llama-q4_k",
          layer(1, matrix_bytes("ffn_up", swap_first_scale_nibbles)), "ffn_up-1"),
    Fault("SwiGLU without its clamp and its 1", "gpt-oss-f32",
          ops(swiglu_clamped=lambda right, g, u: right(g, u - 1)), "ffn_moe_swiglu_oai-0"),
    Fault("softmax over all experts", "gpt-oss-f32",
          ops(row_soft_max=lambda right, x: right(np.append(x, x[:, :1], axis=1))[:, :-1]),
          "ffn_moe_weights_softmax-0"),
    Fault("the worst experts", "gpt-oss-q4_0", ops(top_experts=lambda right, s, n: right(-s, n)), "ffn_moe_topk-0"),
    Fault("exact GELU for tanh GELU", "gpt2-f32",
          ops(gelu=lambda right, x: (x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(x.dtype)),
          "ffn_gelu-0"),
    Fault("LayerNorm as RMSNorm", "gpt2-q8_0",
          ops(start=2, layer_norm=lambda right, x, w, b, eps: refengine.ops.norm.rms_norm(np, x, w, eps) + b),
          "attn_norm-1"),
    Fault("one weight of the head", "qwen3-f32",
          lambda model: matrix_bytes("output", lambda d: d.__setitem__(slice(40, 44), 0))(model.weights),
          "result_output"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_verdict_names_the_tensor_where_the_fault_sits(fault: Fault, tiny_model: Any) -> None:
    path = tiny_model(fault.model)
    broken = load(path, fault.model)
    fault.apply(broken)
    verdict = judge(load(path, fault.model), capture(broken))
    assert verdict.exit_code == DIVERGES
    assert verdict.first_own_error is not None
    assert verdict.first_own_error.name == fault.expected


CAUSES = {
    "epsilon 1e-5 for 1e-6": "the norm's epsilon is 1e-05 instead of 1e-06",
    "epsilon 1e-6 for 1e-5": "the norm's epsilon is 1e-06 instead of 1e-05",
    "RoPE pairs neighbours": "RoPE rotates neighbours (2i, 2i+1) instead of halves (i, i + n/2)",
    "RoPE pairs halves": "RoPE rotates halves (i, i + n/2) instead of neighbours (2i, 2i+1)",
    "RoPE base 1e4 for 1e6": "RoPE's base is 10000 instead of 1e+06",
    "RoPE not applied to K of layer 1": "RoPE is not applied",
    "no YaRN": "YaRN is missing",
    "interleaved K/V heads": "query heads read the wrong K/V head (h % n_head_kv instead of h // group)",
    "no 1/sqrt(d) in layer 1": "scores are not scaled by 1/sqrt(head_dim)",
    "sliding window off by one": "the sliding window is 17 instead of 16 tokens",
    "no sinks": "attention sinks are missing",
    "no bias on Q of layer 1": "the bias attn_q.bias is missing",
    "no bias on V of layer 0": "the bias attn_v.bias is missing",
    "gate and up swapped": "ffn_gate and ffn_up are swapped",
    "K and V swapped": "attn_k and attn_v are swapped",
    "SwiGLU without its clamp and its 1": "the clamped SwiGLU multiplies by up instead of up + 1",
    "exact GELU for tanh GELU": "GELU is taken by the error function instead of its tanh form",
    # These no hypothesis covers, and none is put forward.
    "one swapped scale nibble in Q4_K": None,
    "one weight of the head": None,
    "K cache stride": None,
    "LayerNorm as RMSNorm": None,
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named_where_it_is_known_and_none_made_up(name: str, tiny_model: Any) -> None:
    fault = next(f for f in FAULTS if f.name == name)
    path = tiny_model(fault.model)
    broken, model = load(path, fault.model), load(path, fault.model)
    fault.apply(broken)
    seen = capture(broken)
    verdict = judge(model, seen)
    first = verdict.first_own_error
    assert first is not None
    before = capture(model)
    causes = likely_causes(model, verdict, first)
    assert (causes[:1] or [None]) == [CAUSES[name]]
    # Trying hypotheses has changed nothing in our model.
    assert all(np.array_equal(v, before.tensors[n]) for n, v in capture(model).tensors.items())


HEALTHY = sorted({fault.model for fault in FAULTS})


@pytest.mark.parametrize("name", HEALTHY)
def test_an_engine_without_fault_agrees(name: str, tiny_model: Any) -> None:
    model = load(tiny_model(name), name)
    verdict = judge(load(tiny_model(name), name), capture(model))
    assert verdict
    assert verdict.exit_code == AGREES
    assert verdict.first_own_error is None
    assert verdict.missing == verdict.unknown == ()
    assert verdict.logits is not None
    assert verdict.logits.kl_max < 1e-12


def test_an_inherited_error_is_not_blamed_on_those_who_inherit(tiny_model: Any) -> None:
    """A fault in layer 0 alone: everything after it is far off in total and right by itself."""
    name = "llama-q8_0"
    broken = load(tiny_model(name), name)
    layer(0, swap("ffn_gate", "ffn_up"))(broken)
    verdict = judge(load(tiny_model(name), name), capture(broken))
    assert [t.name for t in verdict.tensors if t.own_error] == ["ffn_up-0", "ffn_gate-0"]
    after = [t for t in verdict.tensors if t.name.endswith("-1")]
    assert len(after) > 10
    assert all(t.total.nmse > 1e-6 > t.threshold >= t.local.nmse for t in after)


def test_nan_of_the_other_engine_is_an_own_error_where_it_first_appears(tiny_model: Any) -> None:
    name = "llama-f32"
    broken = load(tiny_model(name), name)
    silu = ops(start=1, swiglu=lambda right, g, u: np.where(np.arange(g.shape[1]) == 5, np.nan, right(g, u)))
    silu(broken)
    verdict = judge(load(tiny_model(name), name), capture(broken))
    assert verdict.first_own_error is not None
    assert verdict.first_own_error.name == "ffn_swiglu-1"
    assert verdict.first_own_error.local.nonfinite_mismatches == N_TOKENS


def test_a_partial_capture_is_judged_by_what_it_has(tiny_model: Any) -> None:
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


def test_nothing_compared_is_not_agreement(tiny_model: Any) -> None:
    model = load(tiny_model("llama-f32"), "llama-f32")
    verdict = judge(model, replace(capture(model), tensors={"my_tensor": np.zeros(3)}))
    assert not verdict
    assert verdict.exit_code == NOTHING_COMPARED


def test_what_does_not_belong_together_is_refused(tiny_model: Any) -> None:
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


def test_a_tolerance_of_the_user_replaces_the_measured_one(tiny_model: Any) -> None:
    name = "qwen2-f32"
    broken = load(tiny_model(name), name)
    config(norm_eps=1e-5)(broken)
    seen = capture(broken)
    assert judge(load(tiny_model(name), name), seen, tolerances=[("norm", 1e-3)])
    verdict = judge(load(tiny_model(name), name), seen, tolerances=[("norm", 1e-3), ("^attn_norm-1$", 0.0)])
    assert verdict.first_own_error is not None
    assert verdict.first_own_error.name == "attn_norm-1"
