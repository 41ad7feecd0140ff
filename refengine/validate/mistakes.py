"""Known mistakes of engines: a description, the tensors that show them first, and our model changed to make them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refengine import quants
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE
from refengine.ops import Ops
from refengine.ops.activation import gelu
from refengine.ops.attention import causal_mask
from refengine.ops.dequant import float_rows
from refengine.trace import to_numpy

PRODUCTS = r"^(embd$|[QKV]cur-\d+(#0)?$|wqkv|attn_out-|ffn_(up|gate|out|moe_(logits|up|gate|down))-|result_output$)"
NORMS = "norm"
SOFTMAX = "^kq_soft_max-|^kqv_out-"
ROTATED = r"^[QK]cur-\d+(#\d)?$"


@dataclass(frozen=True)
class Hypothesis:
    """A known mistake. tensors: an expression for the tensors that show it first. apply: makes the changed model."""

    tensors: str
    text: str
    apply: Callable[[Model], Model]


def hypotheses(model: Model, first_wrong_row: int = 0) -> Iterator[Hypothesis]:
    """The hypotheses that apply to this model. first_wrong_row: the token at which the error begins."""
    yield from _norm_hypotheses(model)
    if model.config.rope is not None:
        yield from _rope_hypotheses(model, first_wrong_row)
    yield from _attention_hypotheses(model)
    yield from _cache_hypotheses()
    yield from _weight_hypotheses(model)
    yield from _activation_hypotheses(model)


def _has(model: Model, tensor: str) -> bool:
    return getattr(model.weights.layers[0], tensor, None) is not None


def _norm_hypotheses(model: Model) -> Iterator[Hypothesis]:
    cfg = model.config
    for eps in (1e-5, 1e-6, 1e-8, 1e-12, 0.0):
        if eps != cfg.norm_eps:
            words = f"the norm's epsilon is {eps:g} instead of {cfg.norm_eps:g}"
            yield Hypothesis(NORMS, words, _config(norm_eps=eps))
    if _has(model, "attn_norm_bias"):
        rms = _ops(layer_norm=lambda right, x, w, b, eps: model.ops.rms_norm(x, w, eps) + b)
        yield Hypothesis(NORMS, "RMSNorm is computed instead of LayerNorm", rms)
    else:
        plus_one = _ops(rms_norm=lambda right, x, w, eps: right(x, w + 1, eps))
        yield Hypothesis(NORMS, "the norm multiplies by 1 + weight", plus_one)
        no_weight = _ops(rms_norm=lambda right, x, w, eps: right(x, w * 0 + 1, eps))
        yield Hypothesis(NORMS, "the norm does not multiply by its weight", no_weight)
        centred = _ops(rms_norm=lambda right, x, w, eps: right(x - x.mean(axis=-1, keepdims=True), w, eps))
        yield Hypothesis(NORMS, "the norm subtracts the mean (LayerNorm instead of RMSNorm)", centred)


def _rope_hypotheses(model: Model, first_wrong_row: int) -> Iterator[Hypothesis]:
    rope: Any = model.config.rope
    neox = BY_ARCHITECTURE[model.config.arch].TRAITS.rope == "neox"
    pairs = "neighbours (2i, 2i+1)", "halves (i, i + n/2)"
    name = "rope_neox" if neox else "rope_norm"
    other = "rope_norm" if neox else "rope_neox"

    def swapped(changed: Model) -> Model:
        return _ops(**{name: lambda right, x, angles: getattr(changed.ops, other)(x, angles)})(changed)

    wrong, right = pairs if neox else pairs[::-1]
    yield Hypothesis(ROTATED, f"RoPE rotates {wrong} instead of {right}", swapped)
    yield Hypothesis(ROTATED, "RoPE is not applied", _ops(**{name: lambda right, x, angles: x}))
    backwards = _ops(**{name: lambda right, x, angles: right(x, (angles[0], -angles[1]))})
    yield Hypothesis(ROTATED, "RoPE rotates the other way (the sign of sin)", backwards)
    for base in (1e4, 1.5e5, 5e5, 1e6):
        if base != rope.freq_base:
            words = f"RoPE's base is {base:g} instead of {rope.freq_base:g}"
            yield Hypothesis(ROTATED, words, _config(rope=replace(rope, freq_base=base)))
    since = f" from token {first_wrong_row} on" if first_wrong_row else ""
    for shift in (1, -1):
        words = f"positions are off by one{since} (position {'+' if shift > 0 else '-'} 1)"
        yield Hypothesis(ROTATED, words, _ops(rope_angles=_shifted(shift, first_wrong_row)))
    if rope.ext_factor:
        yield Hypothesis(ROTATED, "YaRN is missing", _config(rope=replace(rope, ext_factor=0.0)))
    if rope.freq_scale != 1.0:
        plain = replace(rope, freq_scale=1.0, ext_factor=0.0)
        yield Hypothesis(ROTATED, "RoPE scaling is missing", _config(rope=plain))


def _attention_hypotheses(model: Model) -> Iterator[Hypothesis]:
    cfg = model.config
    if cfg.n_head_kv not in (1, cfg.n_head):
        yield Hypothesis(
            "^kqv?-|^kqv_out-", "query heads read the wrong K/V head (h % n_head_kv instead of h // group)",
            _ops(attention=_interleaved_heads),
        )  # fmt: skip
    yield Hypothesis(SOFTMAX, "scores are not scaled by 1/sqrt(head_dim)", _ops(attention=_with(scale=1.0)))
    twice = _ops(attention=lambda right, *a, scale, **k: right(*a, scale=scale * scale, **k))
    yield Hypothesis(SOFTMAX, "scores are scaled by 1/sqrt(head_dim) twice", twice)
    if cfg.n_swa:
        for n_swa in (cfg.n_swa + 1, cfg.n_swa - 1, 0):
            words = f"the sliding window is {n_swa} instead of {cfg.n_swa} tokens" if n_swa else "no window slides"
            yield Hypothesis(SOFTMAX, words, _config(n_swa=n_swa))
        all_layers = _ops(attention=_with(window=cfg.n_swa))
        yield Hypothesis(SOFTMAX, "the window slides in layers that see everything", all_layers)
    if _has(model, "attn_sinks"):
        yield Hypothesis(SOFTMAX, "attention sinks are missing", _ops(attention=_with(sinks=None)))
    no_max = _ops(attention=_other_soft_max(model.ops.xp, _soft_max_without_max))
    yield Hypothesis(SOFTMAX, "the softmax does not subtract the maximum, and overflows", no_max)
    unmasked = _ops(attention=_other_soft_max(model.ops.xp, _unmasked))
    yield Hypothesis(SOFTMAX, "tokens see those after them (no causal mask)", unmasked)


def _cache_hypotheses() -> Iterator[Hypothesis]:
    """Mistakes of the KV cache, such as a wrong stride or a late write. They show in tensors made from K or V."""
    for change, words in (
        (_newest_missing, "the newest token is not in the {} cache when it is read"),
        (_one_slot_late, "the {} cache is read one slot late: every token gets the one before"),
        (_one_slot_early, "the {} cache is read one slot early: every token gets the one after"),
        (_strides_exchanged, "the {} cache is read with the strides of heads and tokens exchanged"),
    ):
        for tensors, cache in (("^kq-", "K"), ("^kqv-", "V")):
            yield Hypothesis(tensors, words.format(cache), _ops(attention=_other_cache(change)))


def _weight_hypotheses(model: Model) -> Iterator[Hypothesis]:
    for role, name in (("attn_q", "Qcur"), ("attn_k", "Kcur"), ("attn_v", "Vcur"), ("attn_qkv", "wqkv"),
                       ("attn_output", "attn_out"), ("ffn_up", "ffn_up"), ("ffn_down", "ffn_out"),
                       ("ffn_gate_inp", "ffn_moe_probs"), ("ffn_gate_exps", "ffn_moe_gate"),
                       ("ffn_up_exps", "ffn_moe_up"), ("ffn_down_exps", "ffn_moe_down")):  # fmt: skip
        if _has(model, f"{role}_bias"):
            text = f"the bias {role}.bias is missing"
            yield Hypothesis(f"^{name}(_biased)?-", text, _layers(_without_bias(f"{role}_bias")))
    for a, b, tensors in (("ffn_gate", "ffn_up", "^ffn_(up|gate)-"), ("attn_k", "attn_v", "^[KV]cur-"),
                          ("ffn_gate_exps", "ffn_up_exps", "^ffn_moe_(up|gate)-")):  # fmt: skip
        if _has(model, a):
            yield Hypothesis(tensors, f"{a} and {b} are swapped", _layers(_swap(a, b)))
    transposed = "the weight matrix is taken transposed (its data read as n_in rows of n_out)"
    yield Hypothesis(PRODUCTS, transposed, _ops(linear=_transposed(model.ops.xp)))
    types = {info.type for info in model.gguf.tensors.values()} & set(quants.SUPPORTED)
    for kind in sorted(types, key=lambda t: str(t.name)):
        for field, change, words in _WRONG_FIELDS:
            if field in (quants.SUPPORTED[kind].dtype.names or ()):
                text = f"{kind.name} is dequantised wrongly: {words}"
                apply = _ops(
                    linear=_misread(kind, field, change),
                    linear_experts=_misread(kind, field, change),
                    embedding=_misread_embedding(kind, field, change),
                )
                yield Hypothesis(PRODUCTS, text, apply)


def _activation_hypotheses(model: Model) -> Iterator[Hypothesis]:
    yield Hypothesis(
        "swiglu_oai", "the clamped SwiGLU multiplies by up instead of up + 1",
        _ops(swiglu_clamped=lambda right, gate, up: right(gate, up - 1)),
    )  # fmt: skip
    unclamped = _ops(swiglu_clamped=lambda right, gate, up: gate / (1 + model.ops.xp.exp(-1.702 * gate)) * (up + 1))
    yield Hypothesis("swiglu_oai", "the clamped SwiGLU does not clamp", unclamped)
    yield Hypothesis(
        "ffn_swiglu", "the gate's activation is applied to up, not to gate",
        _ops(swiglu=lambda right, gate, up: right(up, gate)),
    )  # fmt: skip
    yield Hypothesis(
        "ffn_moe_weights_softmax", "the router takes its softmax over all experts, before it selects",
        _ops(**_router_soft_max_first(model.ops.xp)),
    )  # fmt: skip
    yield Hypothesis("gelu", "GELU is taken by the error function instead of its tanh form", _ops(gelu=_gelu_erf))
    float_gelu = _ops(gelu=lambda right, x: gelu(model.ops.xp, x))
    yield Hypothesis("gelu", "GELU is computed in float32 instead of llama.cpp's float16 table", float_gelu)


def _config(**changes: Any) -> Callable[[Model], Model]:
    def apply(model: Model) -> Model:
        changed = copy.copy(model)
        changed.config = replace(model.config, **changes)
        return changed

    return apply


class _ChangedOps(Ops):
    """Operations, some of which are replaced by functions of the right operation and its arguments."""

    def __init__(self, ops: Ops, changes: dict[str, Callable[..., Any]]) -> None:
        super().__init__(ops.xp, ops.numerics, cache_bytes=0)  # no cache: it runs only once, and weights may be changed
        for name, change in changes.items():
            right = getattr(super(), name)
            setattr(self, name, lambda *a, _right=right, _change=change, **k: _change(_right, *a, **k))


def _ops(**changes: Callable[..., Any]) -> Callable[[Model], Model]:
    def apply(model: Model) -> Model:
        changed = copy.copy(model)
        changed.ops = _ChangedOps(model.ops, changes)
        return changed

    return apply


def _layers(change: Callable[[Any], None]) -> Callable[[Model], Model]:
    """Makes a copy of a model with `change` applied to the weights of every layer."""

    def apply(model: Model) -> Model:
        changed = copy.copy(model)
        changed.ops = _ChangedOps(model.ops, {})  # its own weight cache
        changed.weights = copy.copy(model.weights)
        changed.weights.layers = [copy.copy(layer) for layer in model.weights.layers]
        for layer in changed.weights.layers:
            change(layer)
        return changed

    return apply


def _without_bias(attribute: str) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, attribute, getattr(layer, attribute) * 0)


def _swap(a: str, b: str) -> Callable[[Any], None]:
    def apply(layer: Any) -> None:
        first, second = getattr(layer, a), getattr(layer, b)
        setattr(layer, a, second)
        setattr(layer, b, first)

    return apply


def _with(**fixed: Any) -> Callable[..., Any]:
    return lambda right, *args, **kwargs: right(*args, **{**kwargs, **fixed})


def _shifted(shift: int, first: int) -> Callable[..., Any]:
    def angles(right: Any, positions: np.ndarray, *args: Any) -> Any:
        return right(np.where(np.arange(len(positions)) >= first, positions + shift, positions), *args)

    return angles


def _router_soft_max_first(xp: Any) -> dict[str, Callable[..., Any]]:
    last: dict[str, Any] = {}

    def take_experts(right: Any, scores: Any, chosen: Any) -> Any:
        last.update(scores=scores, chosen=chosen)
        return right(scores, chosen)

    def row_soft_max(right: Any, x: Any) -> Any:
        return xp.take_along_axis(right(last["scores"]), last["chosen"], axis=-1)

    return {"take_experts": take_experts, "row_soft_max": row_soft_max}


def _other_soft_max(xp: Any, soft_max: Callable[..., Any]) -> Callable[..., Any]:
    """Attention whose weights are `soft_max(xp, kq, masked, scale)`."""

    def attention(right: Any, Qcur: Any, k_cache: Any, v_cache: Any, batch: Any, **given: Any) -> Any:
        probe, kq = given.pop("probe"), None

        def instead(name: str, *, x: Any) -> Any:
            nonlocal kq
            if name == "kq":
                kq = probe(name, x=x)
                return kq
            if name == "kq_soft_max":
                masked = causal_mask(xp, xp.asarray(batch.positions), x.shape[-1], given.get("window", 0))
                x = soft_max(xp, kq, masked, given["scale"]).astype(x.dtype)
            return probe(name, x=x)

        return right(Qcur, k_cache, v_cache, batch, probe=instead, **given)

    return attention


def _soft_max_without_max(xp: Any, kq: Any, masked: Any, scale: float) -> Any:
    e = xp.where(masked, 0, xp.exp(kq * kq.dtype.type(scale)))
    return e / e.sum(axis=-1, keepdims=True, dtype=kq.dtype)


def _unmasked(xp: Any, kq: Any, masked: Any, scale: float) -> Any:
    scores = kq * kq.dtype.type(scale)
    e = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _other_cache(change: Callable[[Any, int], Any]) -> Callable[..., Any]:
    """Attention on changed K and V: `change(rows, n_kv)` of the flat cache (n_slots, n_head_kv, head_dim)."""

    def attention(right: Any, Qcur: Any, k_cache: Any, v_cache: Any, batch: Any, **given: Any) -> Any:
        n_kv = batch.spans[0].n_kv  # the cache has only this sequence, so its slots are positions
        changed = []
        for cache in (k_cache, v_cache):
            rows = cache.reshape(-1, *cache.shape[2:]).copy()
            rows[:n_kv] = change(rows, n_kv)
            changed.append(rows.reshape(cache.shape))
        return right(Qcur, *changed, batch, **given)

    return attention


def _newest_missing(rows: Any, n_kv: int) -> Any:
    changed = rows[:n_kv].copy()
    changed[-1] = 0
    return changed


def _one_slot_late(rows: Any, n_kv: int) -> Any:
    changed = rows[:n_kv].copy()
    changed[1:], changed[0] = rows[: n_kv - 1], 0
    return changed


def _one_slot_early(rows: Any, n_kv: int) -> Any:
    changed = rows[:n_kv].copy()
    changed[:-1], changed[-1] = rows[1:n_kv], 0
    return changed


def _strides_exchanged(rows: Any, n_kv: int) -> Any:
    """Rows that were written token by token, read as if they had been written head by head."""
    n_head_kv, head_dim = rows.shape[1:]
    return rows[:n_kv].reshape(n_head_kv, n_kv, head_dim).transpose(1, 0, 2).copy()


def _transposed(xp: Any) -> Callable[..., Any]:
    def linear(right: Any, x: Any, w: Any, bias: Any = None) -> Any:
        n_out, n_in = w.shape[-2:]
        y = x @ float_rows(xp, w, 0, n_out, x.dtype).reshape(n_in, n_out)
        return y if bias is None else y + bias

    return linear


def _swapped_nibbles(field: np.ndarray) -> Any:
    return (field >> 4) | (field << 4)


def _zero(field: np.ndarray) -> Any:
    return field * 0


_WRONG_FIELDS: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("qs", _swapped_nibbles, "low and high nibbles are exchanged"),
    ("ql", _swapped_nibbles, "low and high nibbles are exchanged"),
    ("qh", _zero, "the high bits (qh) are left out"),
    ("m", _zero, "the minimum is left out"),
    ("dmin", _zero, "the minimums are left out"),
)


def _misread(kind: Any, field: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda right, x, w, *rest: right(x, _changed_matrix(w, kind, field, change), *rest)


def _misread_embedding(kind: Any, field: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda right, w, ids: right(_changed_matrix(w, kind, field, change), ids)


def _changed_matrix(w: Any, kind: Any, field: str, change: Callable[[Any], Any]) -> Any:
    """The matrix with one field of every block changed, if it is of this type."""
    if w.type != kind:
        return w
    layout = quants.SUPPORTED[kind].dtype
    assert layout.fields is not None
    sub, offset = layout.fields[field][:2]
    data = w.data.copy()
    blocks = data.reshape(-1, layout.itemsize)
    blocks[:, offset : offset + sub.itemsize] = change(blocks[:, offset : offset + sub.itemsize])
    return replace(w, data=data)


def _interleaved_heads(right: Any, Qcur: Any, k_cache: Any, v_cache: Any, *args: Any, **rest: Any) -> Any:
    """Attention in which query head h uses K/V head h % n_head_kv."""
    taken = np.arange(Qcur.shape[1]) % k_cache.shape[2]
    return right(Qcur, k_cache[:, :, taken], v_cache[:, :, taken], *args, **rest)


def _gelu_erf(right: Callable[..., Any], x: Any) -> Any:
    erf = np.vectorize(math.erf, otypes=[np.float64])(to_numpy(x).astype(np.float64) / math.sqrt(2.0))
    return (x * 0.5 * (1 + erf)).astype(x.dtype)
