"""The decode step of every architecture: the fused twin of its file in `refengine.models`, top to bottom.

One token a row: every comment names what a line computes as the model file does, in its shapes. The two agree bit for
bit, which tests check at `l_out` of every layer and at the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from refengine.cache.paged import KVCache
from refengine.config import ModelConfig
from refengine.cuda.decode.ops import FusedOps
from refengine.cuda.layout import TILE_ROWS, PackedMatrix

Array = Any
Trace = Callable[[str, int, Any], None]  # what a test sees of a layer: "l_out", il, (n, n_embd)
Forward = Callable[[ModelConfig, Any, FusedOps, Trace], Array]


def no_trace(name: str, il: int, x: Any) -> None:
    """Nothing is recorded."""


def llama(cfg: ModelConfig, w: Any, ops: FusedOps, trace: Trace) -> Array:
    """Logits (n, n_vocab)."""
    scale = 1.0 / math.sqrt(cfg.head_dim)
    x = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        matrices = (layer.attn_q, layer.attn_k, layer.attn_v)
        attn_norm = ops.rms_norm(x, layer.attn_norm, into=matrices)
        biases = (layer.attn_q_bias, layer.attn_k_bias, layer.attn_v_bias)
        qkv = ops.q_k_v(attn_norm, matrices, biases)  # Qmul, Kmul, Vcur
        kqv_out = ops.attention(il, qkv, scale=scale, neox=False)  # (n, n_embd_q)
        ffn_inp = ops.projection(kqv_out, layer.attn_output, x, layer.attn_output_bias)  # (n, n_embd)
        ffn_norm = ops.rms_norm(ffn_inp, layer.ffn_norm, into=(layer.ffn_gate, layer.ffn_up))
        ffn_swiglu = ops.swiglu(ffn_norm, layer.ffn_gate, layer.ffn_up)  # (n, n_ff)
        x = ops.down(ffn_swiglu, layer.ffn_down, ffn_inp)  # (n, n_embd)
        trace("l_out", il, x)
    result_norm = ops.rms_norm(x, w.output_norm, into=(w.output,))
    return ops.logits(result_norm, w.output)


def qwen2(cfg: ModelConfig, w: Any, ops: FusedOps, trace: Trace) -> Array:
    """Logits (n, n_vocab)."""
    scale = 1.0 / math.sqrt(cfg.head_dim)
    x = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        matrices = (layer.attn_q, layer.attn_k, layer.attn_v)
        attn_norm = ops.rms_norm(x, layer.attn_norm, into=matrices)
        biases = (layer.attn_q_bias, layer.attn_k_bias, layer.attn_v_bias)
        qkv = ops.q_k_v(attn_norm, matrices, biases)  # Qbias, Kbias, Vcur
        kqv_out = ops.attention(il, qkv, scale=scale)  # (n, n_embd_q)
        ffn_inp = ops.projection(kqv_out, layer.attn_output, x)  # (n, n_embd)
        ffn_norm = ops.rms_norm(ffn_inp, layer.ffn_norm, into=(layer.ffn_gate, layer.ffn_up))
        ffn_swiglu = ops.swiglu(ffn_norm, layer.ffn_gate, layer.ffn_up)  # (n, n_ff)
        x = ops.down(ffn_swiglu, layer.ffn_down, ffn_inp)  # (n, n_embd)
        trace("l_out", il, x)
    result_norm = ops.rms_norm(x, w.output_norm, into=(w.output,))
    return ops.logits(result_norm, w.output)


def qwen3(cfg: ModelConfig, w: Any, ops: FusedOps, trace: Trace) -> Array:
    """Logits (n, n_vocab)."""
    scale = 1.0 / math.sqrt(cfg.head_dim)
    x = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        matrices = (layer.attn_q, layer.attn_k, layer.attn_v)
        attn_norm = ops.rms_norm(x, layer.attn_norm, into=matrices)
        qkv = ops.q_k_v(attn_norm, matrices)  # Qmul, Kmul, Vcur
        norms = (layer.attn_q_norm, layer.attn_k_norm)  # Qcur_normed, Kcur_normed
        kqv_out = ops.attention(il, qkv, scale=scale, norms=norms)  # (n, n_embd_q)
        ffn_inp = ops.projection(kqv_out, layer.attn_output, x)  # (n, n_embd)
        ffn_norm = ops.rms_norm(ffn_inp, layer.ffn_norm, into=(layer.ffn_gate, layer.ffn_up))
        ffn_swiglu = ops.swiglu(ffn_norm, layer.ffn_gate, layer.ffn_up)  # (n, n_ff)
        x = ops.down(ffn_swiglu, layer.ffn_down, ffn_inp)  # (n, n_embd)
        trace("l_out", il, x)
    result_norm = ops.rms_norm(x, w.output_norm, into=(w.output,))
    return ops.logits(result_norm, w.output)


def phi3(cfg: ModelConfig, w: Any, ops: FusedOps, trace: Trace) -> Array:
    """Logits (n, n_vocab)."""
    q_scale = 1.0 / math.sqrt(cfg.head_dim)
    x = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = ops.rms_norm(x, layer.attn_norm, into=(layer.attn_qkv,))
        wqkv = ops.qkv(attn_norm, layer.attn_qkv)  # (n, n_embd_q + 2 * n_embd_kv)
        kqv_out = ops.attention(il, wqkv, scale=1.0, q_factor=q_scale)  # (n, n_embd_q)
        ffn_inp = ops.projection(kqv_out, layer.attn_output, x)  # (n, n_embd)
        gate, up = halves_of(layer.ffn_up)
        ffn_norm = ops.rms_norm(ffn_inp, layer.ffn_norm, into=(gate, up))
        ffn_swiglu = ops.swiglu(ffn_norm, gate, up)  # (n, n_ff)
        x = ops.down(ffn_swiglu, layer.ffn_down, ffn_inp)  # (n, n_embd)
        trace("l_out", il, x)
    result_norm = ops.rms_norm(x, w.output_norm, into=(w.output,))
    return ops.logits(result_norm, w.output)


def gpt2(cfg: ModelConfig, w: Any, ops: FusedOps, trace: Trace) -> Array:
    """Logits (n, n_vocab)."""
    scale = 1.0 / math.sqrt(cfg.head_dim)
    x = ops.embedding(w.token_embd, w.position_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = ops.layer_norm(x, layer.attn_norm, layer.attn_norm_bias, into=(layer.attn_qkv,))
        wqkv_b = ops.qkv(attn_norm, layer.attn_qkv, layer.attn_qkv_bias)  # (n, n_embd_q + 2 * n_embd_kv)
        kqv_out = ops.attention(il, wqkv_b, scale=scale)  # (n, n_embd_q); no RoPE
        ffn_inp = ops.projection(kqv_out, layer.attn_output, x, layer.attn_output_bias)  # (n, n_embd)
        ffn_norm = ops.layer_norm(ffn_inp, layer.ffn_norm, layer.ffn_norm_bias, into=(layer.ffn_up,))
        ffn_gelu = ops.gelu(ffn_norm, layer.ffn_up, layer.ffn_up_bias)  # (n, n_ff)
        x = ops.down(ffn_gelu, layer.ffn_down, ffn_inp, layer.ffn_down_bias)  # (n, n_embd)
        trace("l_out", il, x)
    result_norm = ops.layer_norm(x, w.output_norm, w.output_norm_bias, into=(w.output,))
    return ops.logits(result_norm, w.output)


def gpt_oss(cfg: ModelConfig, w: Any, ops: FusedOps, trace: Trace) -> Array:
    """Logits (n, n_vocab)."""
    scale = 1.0 / math.sqrt(cfg.head_dim)
    x = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        matrices = (layer.attn_q, layer.attn_k, layer.attn_v)
        attn_norm = ops.rms_norm(x, layer.attn_norm, into=matrices)
        biases = (layer.attn_q_bias, layer.attn_k_bias, layer.attn_v_bias)
        qkv = ops.q_k_v(attn_norm, matrices, biases)  # Qbias, Kbias, Vcur
        kqv_out = ops.attention(il, qkv, scale=scale, window=cfg.swa_window(il), sinks=layer.attn_sinks)
        ffn_inp = ops.projection(kqv_out, layer.attn_output, x, layer.attn_output_bias)  # (n, n_embd)

        readers = (layer.ffn_gate_inp, layer.ffn_gate_exps, layer.ffn_up_exps)
        attn_post_norm = ops.rms_norm(ffn_inp, layer.post_attention_norm, into=readers)
        topk, shares = ops.route(attn_post_norm, layer.ffn_gate_inp, layer.ffn_gate_inp_bias)  # (n, n_expert_used)
        two = (layer.ffn_gate_exps_bias, layer.ffn_up_exps_bias)
        swiglu = ops.swiglu_clamped(attn_post_norm, layer.ffn_gate_exps, layer.ffn_up_exps, two, topk)
        x = ops.down_experts(swiglu, layer.ffn_down_exps, layer.ffn_down_exps_bias, topk, shares, ffn_inp)
        trace("l_out", il, x)
    result_norm = ops.rms_norm(x, w.output_norm, into=(w.output,))
    return ops.logits(result_norm, w.output)


def halves_of(w: PackedMatrix) -> tuple[PackedMatrix, PackedMatrix]:
    """The first and the second half of a matrix's outputs, where a tile ends between them."""
    n_out, n_in = w.shape
    assert n_out % (2 * TILE_ROWS) == 0
    parts = []
    for i in range(2):
        planes = {name: plane[i * len(plane) // 2 : (i + 1) * len(plane) // 2] for name, plane in w.planes.items()}
        parts.append(replace(w, shape=(n_out // 2, n_in), planes=planes))
    return parts[0], parts[1]


def freq_factors(cfg: ModelConfig, w: Any, kv: KVCache) -> Array | None:
    """Of RoPE, as the model files choose them."""
    if cfg.arch == "llama":
        return w.rope_freqs
    if cfg.arch == "phi3":
        assert cfg.rope is not None
        return w.rope_factors_long if kv.n_ctx > cfg.rope.n_ctx_orig else w.rope_factors_short
    return None


BY_ARCHITECTURE: dict[str, Forward] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gpt-oss": gpt_oss,
    "gpt2": gpt2,
}
