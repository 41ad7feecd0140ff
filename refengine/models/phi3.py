"""Phi-3 (Abdin et al. 2024): fused Q·K·V and gate·up matrices, NEOX RoPE with short or long factors, SwiGLU.

Names and order as in llama.cpp's `src/models/phi3.cpp`; shapes in NumPy order. `Qcur#0` comes after RoPE, plain `Qcur`
after its scaling by 1/√head_dim, which this architecture applies to Q instead of to the scores.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from refengine.cache.paged import Batch, KVCache
from refengine.config import ModelConfig, Traits
from refengine.ops import Ops
from refengine.ops.decode import DecodeOps, DecodeTrace, Value
from refengine.trace import Tracer
from refengine.weights import TensorSpec, Weights

TRAITS = Traits(rope="neox")  # llama.cpp turns its sliding window off


def tensors(cfg: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the file, in NumPy order (n_out, n_in)."""
    assert cfg.rope is not None
    specs = {
        "token_embd.weight": TensorSpec((cfg.n_vocab, cfg.n_embd)),
        "output_norm.weight": TensorSpec((cfg.n_embd,)),
        "output.weight": TensorSpec((cfg.n_vocab, cfg.n_embd), optional=True, same_as="token_embd.weight"),
        "rope_factors_long.weight": TensorSpec((cfg.rope.n_rot // 2,), optional=True),
        "rope_factors_short.weight": TensorSpec((cfg.rope.n_rot // 2,), optional=True),
    }
    for il in range(cfg.n_layer):
        specs |= {
            f"blk.{il}.attn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.attn_qkv.weight": TensorSpec((cfg.n_embd_q + 2 * cfg.n_embd_kv, cfg.n_embd)),
            f"blk.{il}.attn_output.weight": TensorSpec((cfg.n_embd, cfg.n_embd_q)),
            f"blk.{il}.ffn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.ffn_up.weight": TensorSpec((2 * cfg.n_ff, cfg.n_embd)),
            f"blk.{il}.ffn_down.weight": TensorSpec((cfg.n_embd, cfg.n_ff)),
        }
    return specs


def forward(cfg: ModelConfig, w: Weights, batch: Batch, kv: KVCache, ops: Ops, trace: Tracer) -> Any:
    """Logits of the rows that `batch` asks for: (n_out, n_vocab). Fills the KV cache at the batch's slots."""
    n_tokens = len(batch.ids)
    head_shape, head_shape_kv = (n_tokens, cfg.n_head, cfg.head_dim), (n_tokens, cfg.n_head_kv, cfg.head_dim)
    k_start, v_start = cfg.n_embd_q, cfg.n_embd_q + cfg.n_embd_kv
    assert cfg.rope is not None
    # As in llama.cpp the choice follows the context that was asked for, not the position, so that K never changes.
    factors = w.rope_factors_long if kv.n_ctx > cfg.rope.n_ctx_orig else w.rope_factors_short
    angles = ops.rope_angles(batch.positions, cfg.rope, factors)
    q_scale = 1.0 / math.sqrt(cfg.head_dim)

    inpL = trace("embd", None, ops.embedding(w.token_embd, batch.ids))  # (n_tokens, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = trace("attn_norm", il, ops.rms_norm(inpL, layer.attn_norm, cfg.norm_eps))  # (n_tokens, n_embd)

        wqkv = trace("wqkv", il, ops.linear(attn_norm, layer.attn_qkv))  # (n_tokens, n_embd_q + 2 * n_embd_kv)
        Qview = wqkv[:, :k_start].reshape(head_shape)  # (n_tokens, n_head, head_dim)
        Kview = wqkv[:, k_start:v_start].reshape(head_shape_kv)  # (n_tokens, n_head_kv, head_dim)
        Vcur = trace("Vcur", il, wqkv[:, v_start:].reshape(head_shape_kv))  # (n_tokens, n_head_kv, head_dim)
        Qrope = trace("Qcur", il, ops.rope_neox(Qview, angles), 0)  # (n_tokens, n_head, head_dim)
        Kcur = trace("Kcur", il, ops.rope_neox(Kview, angles))  # (n_tokens, n_head_kv, head_dim)
        Qcur = trace("Qcur", il, Qrope * Qrope.dtype.type(q_scale))  # (n_tokens, n_head, head_dim)

        ops.kv_append(kv.k[il], Kcur, batch.slots)
        ops.kv_append(kv.v[il], Vcur, batch.slots)
        heads = ops.attention(Qcur, kv.k[il], kv.v[il], batch, scale=1.0, probe=partial(trace, il=il))
        kqv_out = trace("kqv_out", il, heads)  # (n_tokens, n_embd_q)
        attn_out = trace("attn_out", il, ops.linear(kqv_out, layer.attn_output))  # (n_tokens, n_embd)
        ffn_inp = trace("ffn_inp", il, attn_out + inpL)  # (n_tokens, n_embd)

        ffn_norm = trace("ffn_norm", il, ops.rms_norm(ffn_inp, layer.ffn_norm, cfg.norm_eps))  # (n_tokens, n_embd)
        ffn_up = trace("ffn_up", il, ops.linear(ffn_norm, layer.ffn_up))  # (n_tokens, 2 * n_ff): gate, then up
        activated = ops.swiglu(ffn_up[:, : cfg.n_ff], ffn_up[:, cfg.n_ff :])
        ffn_swiglu = trace("ffn_swiglu", il, activated)  # (n_tokens, n_ff)
        ffn_out = trace("ffn_out", il, ops.linear(ffn_swiglu, layer.ffn_down))  # (n_tokens, n_embd)
        l_out = trace("l_out", il, ffn_out + ffn_inp)  # (n_tokens, n_embd)
        inpL = l_out

    out = ops.rows(inpL, batch.rows)  # (n_out, n_embd)
    result_norm = trace("result_norm", None, ops.rms_norm(out, w.output_norm, cfg.norm_eps))  # (n_out, n_embd)
    return trace("result_output", None, ops.linear(result_norm, w.output))  # (n_out, n_vocab)


def decode(cfg: ModelConfig, w: Weights, ops: DecodeOps, trace: DecodeTrace) -> Value:
    """`forward` for n rows, in as few launches as `ops` makes of it. (n_out, n_vocab)"""
    assert cfg.rope is not None
    factors = w.rope_factors_long if ops.n_ctx > cfg.rope.n_ctx_orig else w.rope_factors_short
    angles = ops.rope_angles(cfg.rope, factors)
    q_scale = 1.0 / math.sqrt(cfg.head_dim)
    parts = (cfg.n_embd_q, cfg.n_embd_kv, cfg.n_embd_kv)

    inpL = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = ops.rms_norm(inpL, layer.attn_norm, cfg.norm_eps)  # (n, n_embd)
        wqkv = ops.linear(attn_norm, layer.attn_qkv)  # (n, n_embd_q + 2 * n_embd_kv)
        Qview, Kview, Vcur = ops.split(wqkv, parts)
        Qrope = ops.rope_neox(ops.heads(Qview, cfg.n_head), angles)  # (n, n_head, head_dim)
        Kcur = ops.rope_neox(ops.heads(Kview, cfg.n_head_kv), angles)  # (n, n_head_kv, head_dim)
        Qcur = ops.scale(Qrope, q_scale)  # (n, n_head, head_dim)
        kqv_out = ops.attention(il, Qcur, Kcur, ops.heads(Vcur, cfg.n_head_kv), scale=1.0)  # (n, n_embd_q)
        attn_out = ops.linear(kqv_out, layer.attn_output)  # (n, n_embd)
        ffn_inp = ops.add(attn_out, inpL)  # (n, n_embd)

        ffn_norm = ops.rms_norm(ffn_inp, layer.ffn_norm, cfg.norm_eps)  # (n, n_embd)
        ffn_up = ops.linear(ffn_norm, layer.ffn_up)  # (n, 2 * n_ff): gate, then up
        ffn_swiglu = ops.swiglu(*ops.split(ffn_up, (cfg.n_ff, cfg.n_ff)))  # (n, n_ff)
        ffn_out = ops.linear(ffn_swiglu, layer.ffn_down)  # (n, n_embd)
        l_out = ops.add(ffn_out, ffn_inp)  # (n, n_embd)
        trace("l_out", il, l_out)
        inpL = l_out

    out = ops.rows(inpL)  # (n_out, n_embd)
    result_norm = ops.rms_norm(out, w.output_norm, cfg.norm_eps)  # (n_out, n_embd)
    return ops.linear(result_norm, w.output)  # (n_out, n_vocab)
