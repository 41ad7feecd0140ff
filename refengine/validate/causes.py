"""Why a tensor is wrong: known mistakes, each tried on the other engine's own inputs.

A hypothesis changes our model in the way that engines are often wrong. Where the changed operation, run on the inputs
that the other engine had, gives what the other engine gave, the mistake is named. Nothing is guessed from the looks of
numbers; a cause that no hypothesis covers stays unnamed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refengine.model import Model
from refengine.ops import Ops
from refengine.ops.activation import gelu
from refengine.trace import Trace, to_numpy
from refengine.validate.alignment import nmse, part_of, put_into
from refengine.validate.capture import Capture
from refengine.validate.judge import TensorVerdict, Verdict

MATCH = 1e-3  # of the unexplained error at most, in NMSE, for a hypothesis to count: it must explain nearly all of it


@dataclass(frozen=True)
class Hypothesis:
    """A known mistake: the tensors (expression on names) in which it shows first, in words, and as a changed model."""

    tensors: str
    text: str
    apply: Callable[[Model], Model]


def likely_causes(model: Model, verdict: Verdict, wrong: TensorVerdict) -> list[str]:
    """The mistakes that explain this tensor, the best explanation first. Costs a forward pass for each one tried."""
    capture, found = verdict.capture, []
    for hypothesis in hypotheses(model):
        if re.search(hypothesis.tensors, wrong.name):
            left = _error_under(hypothesis.apply(model), capture, wrong.name)
            if left <= max(wrong.threshold, MATCH * wrong.local.nmse):
                found.append((left, hypothesis.text))
    return [text for _, text in sorted(found)]


def _error_under(changed: Model, capture: Capture, name: str) -> float:
    """NMSE of the capture's tensor from the changed model's, on the capture's inputs. Infinite if it cannot be run."""
    result = math.inf

    def substitute(other: str) -> Callable[[np.ndarray], np.ndarray]:
        def replacement(ours: np.ndarray) -> np.ndarray:
            nonlocal result
            values, theirs = to_numpy(ours), capture.tensors[other]
            if other == name:
                result = nmse(theirs, part_of(other, values, theirs))
            return put_into(other, values, theirs)

        return replacement

    trace = Trace(replace={other: substitute(other) for other in capture.tensors})
    changed.forward(capture.ids, trace=trace, chunk=len(capture.ids))
    return result if math.isfinite(result) else math.inf


def hypotheses(model: Model) -> Iterator[Hypothesis]:
    """Those that make a difference for this model."""
    cfg = model.config

    def has(tensor: str) -> bool:
        return getattr(model.weights.layers[0], tensor, None) is not None

    for eps in (1e-5, 1e-6, 1e-8, 1e-12, 0.0):
        if eps != cfg.norm_eps:
            words = f"the norm's epsilon is {eps:g} instead of {cfg.norm_eps:g}"
            yield Hypothesis("norm", words, _config(norm_eps=eps))
    if cfg.rope is not None:
        yield from _rope_hypotheses(model)
    if cfg.n_head_kv not in (1, cfg.n_head):
        yield Hypothesis(
            "^kqv?-|^kqv_out-", "query heads read the wrong K/V head (h % n_head_kv instead of h // group)",
            _ops(attention=_interleaved_heads),
        )  # fmt: skip
    unscaled = _ops(attention=_with(scale=1.0))
    yield Hypothesis("^kq_soft_max-|^kqv_out-", "scores are not scaled by 1/sqrt(head_dim)", unscaled)
    if cfg.n_swa:
        for n_swa in (cfg.n_swa + 1, cfg.n_swa - 1, 0):
            words = f"the sliding window is {n_swa} instead of {cfg.n_swa} tokens" if n_swa else "no window slides"
            yield Hypothesis("^kq_soft_max-|^kqv_out-", words, _config(n_swa=n_swa))
    if has("attn_sinks"):
        yield Hypothesis("^kq_soft_max-|^kqv_out-", "attention sinks are missing", _ops(attention=_with(sinks=None)))
    for role, name in (("attn_q", "Qcur"), ("attn_k", "Kcur"), ("attn_v", "Vcur"), ("attn_qkv", "wqkv")):
        if has(f"{role}_bias"):
            yield Hypothesis(f"^{name}", f"the bias {role}.bias is missing", _layers(_without_bias(f"{role}_bias")))
    if has("ffn_gate"):
        yield Hypothesis("^ffn_(up|gate)-", "ffn_gate and ffn_up are swapped", _layers(_swap("ffn_gate", "ffn_up")))
    if has("attn_k"):
        yield Hypothesis("^[KV]cur-", "attn_k and attn_v are swapped", _layers(_swap("attn_k", "attn_v")))
    yield Hypothesis(
        "swiglu_oai", "the clamped SwiGLU multiplies by up instead of up + 1",
        _ops(swiglu_clamped=lambda right, gate, up: right(gate, up - 1)),
    )  # fmt: skip
    yield Hypothesis("gelu", "GELU is taken by the error function instead of its tanh form", _ops(gelu=_gelu_erf))
    float_gelu = _ops(gelu=lambda right, x: gelu(model.ops.xp, x))
    yield Hypothesis("gelu", "GELU is computed in float32 instead of llama.cpp's float16 table", float_gelu)


def _rope_hypotheses(model: Model) -> Iterator[Hypothesis]:
    after_rope = r"^[QK]cur-\d+$"
    rope: Any = model.config.rope
    neox = model.config.arch != "llama"
    pairs = "neighbours (2i, 2i+1)", "halves (i, i + n/2)"
    name = "rope_neox" if neox else "rope_norm"
    other = "rope_norm" if neox else "rope_neox"

    def swapped(changed: Model) -> Model:
        return _ops(**{name: lambda right, x, angles: getattr(changed.ops, other)(x, angles)})(changed)

    wrong, right = pairs if neox else pairs[::-1]
    yield Hypothesis(after_rope, f"RoPE rotates {wrong} instead of {right}", swapped)
    yield Hypothesis(after_rope, "RoPE is not applied", _ops(**{name: lambda right, x, angles: x}))
    for base in (1e4, 1.5e5, 5e5, 1e6):
        if base != rope.freq_base:
            words = f"RoPE's base is {base:g} instead of {rope.freq_base:g}"
            yield Hypothesis(after_rope, words, _config(rope=replace(rope, freq_base=base)))
    for shift in (1, -1):
        words = f"positions are off by one (position {'+' if shift > 0 else '-'} 1)"
        yield Hypothesis(after_rope, words, _ops(rope_angles=_shifted(shift)))
    if rope.ext_factor:
        yield Hypothesis(after_rope, "YaRN is missing", _config(rope=replace(rope, ext_factor=0.0)))
    if rope.freq_scale != 1.0:
        plain = replace(rope, freq_scale=1.0, ext_factor=0.0)
        yield Hypothesis(after_rope, "RoPE scaling is missing", _config(rope=plain))


def _config(**changes: Any) -> Callable[[Model], Model]:
    def apply(model: Model) -> Model:
        changed = copy.copy(model)
        changed.config = replace(model.config, **changes)
        return changed

    return apply


class _ChangedOps(Ops):
    """Operations of which some are replaced by functions of the right one and its arguments."""

    def __init__(self, ops: Ops, changes: dict[str, Callable[..., Any]]) -> None:
        super().__init__(ops.xp, ops.numerics, cache_bytes=0)  # it runs once
        for name, change in changes.items():
            setattr(self, name, lambda *a, _right=getattr(ops, name), _change=change, **k: _change(_right, *a, **k))


def _ops(**changes: Callable[..., Any]) -> Callable[[Model], Model]:
    def apply(model: Model) -> Model:
        changed = copy.copy(model)
        changed.ops = _ChangedOps(model.ops, changes)
        return changed

    return apply


def _layers(change: Callable[[Any], None]) -> Callable[[Model], Model]:
    """A model whose layers' weights are changed, all of them; the given one is left as it is."""

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


def _shifted(shift: int) -> Callable[..., Any]:
    return lambda right, positions, *args: right(positions + shift, *args)


def _interleaved_heads(right: Any, Qcur: Any, k_cache: Any, v_cache: Any, *args: Any, **rest: Any) -> Any:
    """Query head h reads K/V head h % n_head_kv: every query head gets a K/V head of its own, that one."""
    taken = np.arange(Qcur.shape[1]) % k_cache.shape[2]
    return right(Qcur, k_cache[:, :, taken], v_cache[:, :, taken], *args, **rest)


def _gelu_erf(right: Callable[..., Any], x: Any) -> Any:
    erf = np.vectorize(math.erf, otypes=[np.float64])(to_numpy(x).astype(np.float64) / math.sqrt(2.0))
    return (x * 0.5 * (1 + erf)).astype(x.dtype)
