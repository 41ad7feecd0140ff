"""Llama (Touvron et al. 2023): pre-norm, grouped-query attention with interleaved RoPE, SwiGLU.

Read this one first. Every local is a tensor of llama.cpp's graph (`src/models/llama.cpp`) under its name; its shape, in
NumPy order, stands at the end of the line; ggml lists the same axes in reverse. `trace` may record or replace it.
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

TRAITS = Traits(rope="norm", rope_whole_head=True)


def tensors(cfg: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the file, in NumPy order (n_out, n_in)."""
    assert cfg.rope is not None
    specs = {
        "token_embd.weight": TensorSpec((cfg.n_vocab, cfg.n_embd)),
        "output_norm.weight": TensorSpec((cfg.n_embd,)),
        "output.weight": TensorSpec((cfg.n_vocab, cfg.n_embd), optional=True, same_as="token_embd.weight"),
        "rope_freqs.weight": TensorSpec((cfg.rope.n_rot // 2,), optional=True),
    }
    for il in range(cfg.n_layer):
        specs |= {
            f"blk.{il}.attn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.attn_q.weight": TensorSpec((cfg.n_embd_q, cfg.n_embd)),
            f"blk.{il}.attn_k.weight": TensorSpec((cfg.n_embd_kv, cfg.n_embd)),
            f"blk.{il}.attn_v.weight": TensorSpec((cfg.n_embd_kv, cfg.n_embd)),
            f"blk.{il}.attn_q.bias": TensorSpec((cfg.n_embd_q,), optional=True),
            f"blk.{il}.attn_k.bias": TensorSpec((cfg.n_embd_kv,), optional=True),
            f"blk.{il}.attn_v.bias": TensorSpec((cfg.n_embd_kv,), optional=True),
            f"blk.{il}.attn_output.weight": TensorSpec((cfg.n_embd, cfg.n_embd_q)),
            f"blk.{il}.attn_output.bias": TensorSpec((cfg.n_embd,), optional=True),
            f"blk.{il}.ffn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.ffn_gate.weight": TensorSpec((cfg.n_ff, cfg.n_embd)),
            f"blk.{il}.ffn_up.weight": TensorSpec((cfg.n_ff, cfg.n_embd)),
            f"blk.{il}.ffn_down.weight": TensorSpec((cfg.n_embd, cfg.n_ff)),
        }
    return specs


def forward(cfg: ModelConfig, w: Weights, batch: Batch, kv: KVCache, ops: Ops, trace: Tracer) -> Any:
    """Logits of the rows that `batch` asks for: (n_out, n_vocab). Fills the KV cache at the batch's slots."""
    n_tokens = len(batch.ids)
    head_shape, head_shape_kv = (n_tokens, cfg.n_head, cfg.head_dim), (n_tokens, cfg.n_head_kv, cfg.head_dim)
    angles = ops.rope_angles(batch.positions, cfg.rope, w.rope_freqs)
    scale = 1.0 / math.sqrt(cfg.head_dim)

    inpL = trace("embd", None, ops.embedding(w.token_embd, batch.ids))  # (n_tokens, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = trace("attn_norm", il, ops.rms_norm(inpL, layer.attn_norm, cfg.norm_eps))  # (n_tokens, n_embd)

        Qmul = trace("Qcur", il, ops.linear(attn_norm, layer.attn_q, layer.attn_q_bias), 0)  # (n_tokens, n_embd_q)
        Kmul = trace("Kcur", il, ops.linear(attn_norm, layer.attn_k, layer.attn_k_bias), 0)  # (n_tokens, n_embd_kv)
        Vcur = trace("Vcur", il, ops.linear(attn_norm, layer.attn_v, layer.attn_v_bias))  # (n_tokens, n_embd_kv)
        Qcur = trace("Qcur", il, ops.rope_norm(Qmul.reshape(head_shape), angles))  # (n_tokens, n_head, head_dim)
        Kcur = trace("Kcur", il, ops.rope_norm(Kmul.reshape(head_shape_kv), angles))  # (n_tokens, n_head_kv, head_dim)

        ops.kv_append(kv.k[il], Kcur, batch.slots)
        ops.kv_append(kv.v[il], Vcur.reshape(head_shape_kv), batch.slots)
        heads = ops.attention(Qcur, kv.k[il], kv.v[il], batch, scale=scale, probe=partial(trace, il=il))
        kqv_out = trace("kqv_out", il, heads)  # (n_tokens, n_embd_q)
        projected = ops.linear(kqv_out, layer.attn_output, layer.attn_output_bias)
        attn_out = trace("attn_out", il, projected)  # (n_tokens, n_embd)
        ffn_inp = trace("ffn_inp", il, attn_out + inpL)  # (n_tokens, n_embd)

        ffn_norm = trace("ffn_norm", il, ops.rms_norm(ffn_inp, layer.ffn_norm, cfg.norm_eps))  # (n_tokens, n_embd)
        ffn_up = trace("ffn_up", il, ops.linear(ffn_norm, layer.ffn_up))  # (n_tokens, n_ff)
        ffn_gate = trace("ffn_gate", il, ops.linear(ffn_norm, layer.ffn_gate))  # (n_tokens, n_ff)
        ffn_swiglu = trace("ffn_swiglu", il, ops.swiglu(ffn_gate, ffn_up))  # (n_tokens, n_ff)
        ffn_out = trace("ffn_out", il, ops.linear(ffn_swiglu, layer.ffn_down))  # (n_tokens, n_embd)
        l_out = trace("l_out", il, ffn_out + ffn_inp)  # (n_tokens, n_embd)
        inpL = l_out

    out = ops.rows(inpL, batch.rows)  # (n_out, n_embd)
    result_norm = trace("result_norm", None, ops.rms_norm(out, w.output_norm, cfg.norm_eps))  # (n_out, n_embd)
    return trace("result_output", None, ops.linear(result_norm, w.output))  # (n_out, n_vocab)


def decode(cfg: ModelConfig, w: Weights, ops: DecodeOps, trace: DecodeTrace) -> Value:
    """`forward` for n rows, in as few launches as `ops` makes of it. (n_out, n_vocab)"""
    angles = ops.rope_angles(cfg.rope, w.rope_freqs)
    scale = 1.0 / math.sqrt(cfg.head_dim)

    inpL = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = ops.rms_norm(inpL, layer.attn_norm, cfg.norm_eps)  # (n, n_embd)
        Qmul = ops.linear(attn_norm, layer.attn_q, layer.attn_q_bias)  # (n, n_embd_q)
        Kmul = ops.linear(attn_norm, layer.attn_k, layer.attn_k_bias)  # (n, n_embd_kv)
        Vcur = ops.linear(attn_norm, layer.attn_v, layer.attn_v_bias)  # (n, n_embd_kv)
        Qcur = ops.rope_norm(ops.heads(Qmul, cfg.n_head), angles)  # (n, n_head, head_dim)
        Kcur = ops.rope_norm(ops.heads(Kmul, cfg.n_head_kv), angles)  # (n, n_head_kv, head_dim)
        Vheads = ops.heads(Vcur, cfg.n_head_kv)  # (n, n_head_kv, head_dim)
        kqv_out = ops.attention(il, Qcur, Kcur, Vheads, scale=scale)  # (n, n_embd_q)
        attn_out = ops.linear(kqv_out, layer.attn_output, layer.attn_output_bias)  # (n, n_embd)
        ffn_inp = ops.add(attn_out, inpL)  # (n, n_embd)

        ffn_norm = ops.rms_norm(ffn_inp, layer.ffn_norm, cfg.norm_eps)  # (n, n_embd)
        ffn_up = ops.linear(ffn_norm, layer.ffn_up)  # (n, n_ff)
        ffn_gate = ops.linear(ffn_norm, layer.ffn_gate)  # (n, n_ff)
        ffn_swiglu = ops.swiglu(ffn_gate, ffn_up)  # (n, n_ff)
        ffn_out = ops.linear(ffn_swiglu, layer.ffn_down)  # (n, n_embd)
        l_out = ops.add(ffn_out, ffn_inp)  # (n, n_embd)
        trace("l_out", il, l_out)
        inpL = l_out

    out = ops.rows(inpL)  # (n_out, n_embd)
    result_norm = ops.rms_norm(out, w.output_norm, cfg.norm_eps)  # (n_out, n_embd)
    return ops.linear(result_norm, w.output)  # (n_out, n_vocab)
