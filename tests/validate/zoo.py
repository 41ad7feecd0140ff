"""A zoo of broken engines: each is our own engine with one fault, the tensor at which it shows first, and its cause."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

import refengine
from refengine import quants
from refengine.model import Model
from refengine.ops import Ops
from refengine.validate.capture import Capture
from tools.make_model import TINY

N_TOKENS = 24


def load(path: Path, name: str) -> Model:
    # Faults change weights after loading: none may have been dequantised by then.
    kv_type = "f32" if TINY[name].type == "F32" else "f16"
    return refengine.load(path, numerics="llamacpp", kv_type=kv_type, cpu_cache_mb=0)


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

    def _call(
        self, right: Callable[..., Any], broken: Callable[..., Any], start: int, *args: Any, **kwargs: Any
    ) -> Any:
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
        assert model.config.rope is not None
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


def matrix_field(attribute: str, field: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """One field of every block of a matrix, changed."""

    def apply(weights: Any) -> None:
        matrix = getattr(weights, attribute)
        setattr(weights, attribute, changed_field(matrix, field, change))

    return apply


def changed_field(matrix: Any, field: str, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    layout = quants.SUPPORTED[matrix.type].dtype
    blocks = np.array(matrix.data).view(layout)
    raw = blocks[field].reshape(len(blocks), -1)
    blocks[field] = change(raw.view(np.uint8)).view(raw.dtype).reshape(blocks[field].shape)
    return replace(matrix, data=blocks.view(np.uint8).reshape(-1))


def misread(kind: str, field: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Model], None]:
    """Every matrix of one type, with one field of every block changed."""
    wanted = GGMLQuantizationType[kind]

    def apply(model: Model) -> None:
        for owner in (model.weights, *model.weights.layers):
            for attribute, matrix in list(vars(owner).items()):
                if getattr(matrix, "type", None) == wanted:
                    setattr(owner, attribute, changed_field(matrix, field, change))

    return apply


def attention_layer(il: int, dtype: str, soft_max: Callable[..., Any]) -> Callable[[Model], None]:
    """From layer `il` on, another softmax, `soft_max(scaled scores, masked)`."""

    def broken(right: Any, Qcur: Any, k: Any, v: Any, batch: Any, *, probe: Any, scale: float, **given: Any) -> Any:
        seen: dict[str, Any] = {}

        def instead(name: str, *, x: Any) -> Any:
            if name == "kq_soft_max":
                masked = refengine.ops.attention.causal_mask(np, batch.positions, x.shape[-1], given.get("window", 0))
                x = soft_max(seen["kq"] * np.float32(scale), masked).astype(x.dtype)
            seen[name] = probe(name, x=x)
            return seen[name]

        return right(Qcur, k, v, batch, probe=instead, scale=scale, **given)

    return ops(start=il, attention=broken)


def no_mask(scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def no_maximum(scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
    e = np.where(masked, 0, np.exp(scores))
    return e / e.sum(axis=-1, keepdims=True)


def loud_queries(model: Model) -> None:
    """Scores past 88, where exp overflows float32."""
    for weights in model.weights.layers:
        data = np.array(weights.attn_q.data).view(np.float32) * 200
        weights.attn_q = replace(weights.attn_q, data=data.view(np.uint8))


def loud_experts(model: Model) -> None:
    for weights in model.weights.layers:
        weights.ffn_gate_exps_bias = weights.ffn_gate_exps_bias + 9
        weights.ffn_up_exps_bias = weights.ffn_up_exps_bias - 8


def unclamped(right: Any, gate: Any, up: Any) -> Any:
    return (gate / (1 + np.exp(np.float32(-1.702) * gate)) * (up + 1)).astype(gate.dtype)


def exchanged_strides(right: Any, Qcur: Any, k_cache: Any, v_cache: Any, batch: Any, **given: Any) -> Any:
    n, (n_head_kv, head_dim) = batch.spans[0].n_kv, k_cache.shape[2:]
    rows = k_cache.reshape(-1, n_head_kv, head_dim).copy()
    rows[:n] = rows[:n].reshape(n_head_kv, n, head_dim).transpose(1, 0, 2)
    return right(Qcur, rows.reshape(k_cache.shape), v_cache, batch, **given)


def router_soft_max_first(model: Model) -> None:
    take, soft_max = model.ops.take_experts, model.ops.row_soft_max
    last: dict[str, Any] = {}

    def take_experts(right: Any, scores: Any, chosen: Any) -> Any:
        last.update(scores=scores, chosen=chosen)
        return take(scores, chosen)

    def row_soft_max(right: Any, x: Any) -> Any:
        return np.take_along_axis(soft_max(last["scores"]), last["chosen"], axis=-1)

    ops(take_experts=take_experts, row_soft_max=row_soft_max)(model)


@dataclass(frozen=True)
class Fault:
    """expected: the tensor at which it shows first. cause: as the verdict should word it; None where none is known.

    both: done to the right model too, where the fault shows only for loud enough values.
    """

    name: str
    model: str
    apply: Callable[[Model], None]
    expected: str
    cause: str | None = None
    both: Callable[[Model], None] = lambda model: None

    def models(self, path: Path) -> tuple[Model, Model]:
        """The broken one, and the right one."""
        broken, right = load(path, self.model), load(path, self.model)
        for model in (broken, right):
            self.both(model)
        self.apply(broken)
        return broken, right


FAULTS = [
    Fault("epsilon 1e-5 for 1e-6", "qwen2-f32", config(norm_eps=1e-5), "attn_norm-0",
          "the norm's epsilon is 1e-05 instead of 1e-06"),
    Fault("epsilon 1e-6 for 1e-5", "llama-q4_0", config(norm_eps=1e-6), "attn_norm-0",
          "the norm's epsilon is 1e-06 instead of 1e-05"),
    Fault("RoPE pairs neighbours", "qwen2-q8_0",
          ops(rope_neox=lambda right, x, a: refengine.ops.rope.rope_norm(np, x, *a)), "Qcur-0",
          "RoPE rotates neighbours (2i, 2i+1) instead of halves (i, i + n/2)"),
    Fault("RoPE pairs halves", "llama-q5_k",
          ops(rope_norm=lambda right, x, a: refengine.ops.rope.rope_neox(np, x, *a)), "Qcur-0",
          "RoPE rotates halves (i, i + n/2) instead of neighbours (2i, 2i+1)"),
    Fault("RoPE base 1e4 for 1e6", "qwen3-q4_k_m", rope(freq_base=1e4), "Qcur-0",
          "RoPE's base is 10000 instead of 1e+06"),
    Fault("RoPE not applied to K of layer 1", "llama-f32",
          ops(start=3, rope_norm=lambda right, x, a: x), "Kcur-1",
          "RoPE is not applied"),
    Fault("positions off by one from token 17 on", "qwen2-q4_k_m", ops(rope_angles=shifted_positions), "Qcur-0",
          "positions are off by one from token 17 on (position + 1)"),
    Fault("no YaRN", "gpt-oss-f32", rope(ext_factor=0.0), "Qcur-0",
          "YaRN is missing"),
    Fault("interleaved K/V heads", "llama-f32", ops(attention=interleaved_heads), "kq-0",
          "query heads read the wrong K/V head (h % n_head_kv instead of h // group)"),
    Fault("no 1/sqrt(d) in layer 1", "qwen2-f32", ops(start=1, attention=without(scale=1.0)), "kq_soft_max-1",
          "scores are not scaled by 1/sqrt(head_dim)"),
    Fault("sliding window off by one", "gpt-oss-mxfp4_moe", config(n_swa=TINY["gpt-oss-mxfp4_moe"].n_swa + 1),
          "kq_soft_max-0",
          "the sliding window is 17 instead of 16 tokens"),
    Fault("no sinks", "gpt-oss-q8_0", ops(attention=without(sinks=None)), "kq_soft_max-0",
          "attention sinks are missing"),
    Fault("K cache stride", "phi3-q4_k_m", ops(kv_append=stale_slot), "kq-0",
          "the newest token is not in the K cache when it is read"),
    Fault("V cache stride in layer 1", "llama-f32", ops(start=3, kv_append=stale_slot), "kqv-1",
          "the newest token is not in the V cache when it is read"),
    Fault("no bias on Q of layer 1", "qwen2-q4_k_m", layer(1, set_zero("attn_q_bias")), "Qcur-1#1",
          "the bias attn_q.bias is missing"),
    Fault("no bias on V of layer 0", "qwen2-f32", layer(0, set_zero("attn_v_bias")), "Vcur-0",
          "the bias attn_v.bias is missing"),
    Fault("transposed output projection", "llama-f32", layer(1, transpose), "attn_out-1",
          "the weight matrix is taken transposed (its data read as n_in rows of n_out)"),
    Fault("gate and up swapped", "llama-q4_0", layer(1, swap("ffn_gate", "ffn_up")), "ffn_up-1",
          "ffn_gate and ffn_up are swapped"),
    Fault("K and V swapped", "llama-q8_0", layer(0, swap("attn_k", "attn_v")), "Kcur-0#0",
          "attn_k and attn_v are swapped"),
    Fault("one swapped scale nibble in Q4_K", "llama-q4_k",
          layer(1, matrix_bytes("ffn_up", swap_first_scale_nibbles)), "ffn_up-1"),
    Fault("SwiGLU without its clamp and its 1", "gpt-oss-f32",
          ops(swiglu_clamped=lambda right, g, u: right(g, u - 1)), "ffn_moe_swiglu_oai-0",
          "the clamped SwiGLU multiplies by up instead of up + 1"),
    Fault("softmax over all experts", "gpt-oss-f32",
          ops(row_soft_max=lambda right, x: right(np.append(x, x[:, :1], axis=1))[:, :-1]),
          "ffn_moe_weights_softmax-0"),
    Fault("the worst experts", "gpt-oss-q4_0", ops(top_experts=lambda right, s, n: right(-s, n)), "ffn_moe_topk-0"),
    Fault("exact GELU for tanh GELU", "gpt2-f32",
          ops(gelu=lambda right, x: (x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(x.dtype)),
          "ffn_gelu-0",
          "GELU is taken by the error function instead of its tanh form"),
    Fault("LayerNorm as RMSNorm", "gpt2-q8_0",
          ops(start=2, layer_norm=lambda right, x, w, b, eps: refengine.ops.norm.rms_norm(np, x, w, eps) + b),
          "attn_norm-1",
          "RMSNorm is computed instead of LayerNorm"),
    Fault("one weight of the head", "qwen3-f32",
          lambda model: matrix_bytes("output", lambda d: d.__setitem__(slice(40, 44), 0))(model.weights),
          "result_output"),
    Fault("norm times 1 + weight in layer 1", "llama-q4_k",
          ops(start=2, rms_norm=lambda right, x, w, eps: right(x, w + 1, eps)), "attn_norm-1",
          "the norm multiplies by 1 + weight"),
    Fault("norm with its mean subtracted", "qwen3-f32",
          ops(rms_norm=lambda right, x, w, eps: right(x - x.mean(axis=-1, keepdims=True), w, eps)), "attn_norm-0",
          "the norm subtracts the mean (LayerNorm instead of RMSNorm)"),
    Fault("RoPE the other way round", "phi3-q4_k_m",
          ops(rope_neox=lambda right, x, a: right(x, (a[0], -a[1]))), "Qcur-0#0",
          "RoPE rotates the other way (the sign of sin)"),
    Fault("no causal mask in layer 1", "qwen2-q8_0", attention_layer(1, "f32", no_mask), "kq_soft_max-1",
          "tokens see those after them (no causal mask)"),
    Fault("softmax without its maximum", "llama-f32", attention_layer(0, "f32", no_maximum), "kq_soft_max-0",
          "the softmax does not subtract the maximum, and overflows", both=loud_queries),
    Fault("a sliding window in every layer", "gpt-oss-q4_0",
          ops(attention=without(window=TINY["gpt-oss-q4_0"].n_swa)), "kq_soft_max-1",
          "the window slides in layers that see everything"),
    Fault("K cache read with heads and tokens exchanged", "llama-q6_k",
          ops(attention=exchanged_strides), "kq-0",
          "the K cache is read with the strides of heads and tokens exchanged"),
    Fault("router softmax before selection", "gpt-oss-mxfp4_moe", router_soft_max_first, "ffn_moe_weights_softmax-0",
          "the router takes its softmax over all experts, before it selects"),
    Fault("Q4_0 nibbles exchanged", "llama-q4_0", misread("Q4_0", "qs", lambda b: b >> 4 | b << 4), "embd",
          "Q4_0 is dequantised wrongly: low and high nibbles are exchanged"),
    Fault("Q4_K without its minimums, in one matrix", "llama-q4_k",
          layer(1, matrix_field("attn_v", "dmin", lambda b: b * 0)), "Vcur-1",
          "Q4_K is dequantised wrongly: the minimums are left out"),
    Fault("Q5_0 without its fifth bits", "llama-q5_0", misread("Q5_0", "qh", lambda b: b * 0), "embd",
          "Q5_0 is dequantised wrongly: the high bits (qh) are left out"),
    Fault("MXFP4 scales not halved", "llama-mxfp4", layer(1, matrix_field("ffn_down", "e", lambda b: b + 1)),
          "ffn_out-1", "it is 2 times what it should be"),
    Fault("no clamp in SwiGLU", "gpt-oss-q8_0", ops(swiglu_clamped=unclamped), "ffn_moe_swiglu_oai-0",
          "the clamped SwiGLU does not clamp", both=loud_experts),
    Fault("activation applied to up", "qwen3-q4_k_m", ops(start=1, swiglu=lambda right, g, u: right(u, g)),
          "ffn_swiglu-1", "the gate's activation is applied to up, not to gate"),
    Fault("float16 activations into one product", "qwen2-f32",
          ops(start=4, linear=lambda right, x, w, *b: right(x.astype(np.float16).astype(x.dtype), w, *b)), "ffn_up-0"),
    Fault("bias twice on K of layer 2", "qwen2-q8_0",
          layer(2, lambda w: setattr(w, "attn_k_bias", w.attn_k_bias * 2)), "Kcur-2#1"),
]  # fmt: skip
