"""GPT-OSS (OpenAI 2025): mixture of experts with biases, attention sinks, alternating sliding window, YaRN.

Names and order as in llama.cpp's `src/models/openai-moe.cpp`; shapes in NumPy order. The router takes the softmax over
the logits of the experts it selected, not over all.
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

TRAITS = Traits(rope="neox", experts=True, sliding_window=True)


def tensors(cfg: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the file, in NumPy order (n_expert, n_out, n_in)."""
    n_expert, n_ff_exp = cfg.n_expert, cfg.n_ff_exp
    specs = {
        "token_embd.weight": TensorSpec((cfg.n_vocab, cfg.n_embd)),
        "output_norm.weight": TensorSpec((cfg.n_embd,)),
        "output.weight": TensorSpec((cfg.n_vocab, cfg.n_embd)),
    }
    for il in range(cfg.n_layer):
        specs |= {
            f"blk.{il}.attn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.attn_q.weight": TensorSpec((cfg.n_embd_q, cfg.n_embd)),
            f"blk.{il}.attn_k.weight": TensorSpec((cfg.n_embd_kv, cfg.n_embd)),
            f"blk.{il}.attn_v.weight": TensorSpec((cfg.n_embd_kv, cfg.n_embd)),
            f"blk.{il}.attn_q.bias": TensorSpec((cfg.n_embd_q,)),
            f"blk.{il}.attn_k.bias": TensorSpec((cfg.n_embd_kv,)),
            f"blk.{il}.attn_v.bias": TensorSpec((cfg.n_embd_kv,)),
            f"blk.{il}.attn_sinks.weight": TensorSpec((cfg.n_head,)),
            f"blk.{il}.attn_output.weight": TensorSpec((cfg.n_embd, cfg.n_embd_q)),
            f"blk.{il}.attn_output.bias": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.post_attention_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.ffn_gate_inp.weight": TensorSpec((n_expert, cfg.n_embd)),
            f"blk.{il}.ffn_gate_inp.bias": TensorSpec((n_expert,)),
            f"blk.{il}.ffn_gate_exps.weight": TensorSpec((n_expert, n_ff_exp, cfg.n_embd)),
            f"blk.{il}.ffn_gate_exps.bias": TensorSpec((n_expert, n_ff_exp)),
            f"blk.{il}.ffn_up_exps.weight": TensorSpec((n_expert, n_ff_exp, cfg.n_embd)),
            f"blk.{il}.ffn_up_exps.bias": TensorSpec((n_expert, n_ff_exp)),
            f"blk.{il}.ffn_down_exps.weight": TensorSpec((n_expert, cfg.n_embd, n_ff_exp)),
            f"blk.{il}.ffn_down_exps.bias": TensorSpec((n_expert, cfg.n_embd)),
        }
    return specs


def forward(cfg: ModelConfig, w: Weights, batch: Batch, kv: KVCache, ops: Ops, trace: Tracer) -> Any:
    """Logits of the rows that `batch` asks for: (n_out, n_vocab). Fills the KV cache at the batch's slots."""
    n_tokens = len(batch.ids)
    head_shape, head_shape_kv = (n_tokens, cfg.n_head, cfg.head_dim), (n_tokens, cfg.n_head_kv, cfg.head_dim)
    angles = ops.rope_angles(batch.positions, cfg.rope)
    scale = 1.0 / math.sqrt(cfg.head_dim)

    inpL = trace("embd", None, ops.embedding(w.token_embd, batch.ids))  # (n_tokens, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = trace("attn_norm", il, ops.rms_norm(inpL, layer.attn_norm, cfg.norm_eps))  # (n_tokens, n_embd)

        Qmul = trace("Qcur", il, ops.linear(attn_norm, layer.attn_q), 0)  # (n_tokens, n_embd_q)
        Qbias = trace("Qcur", il, Qmul + layer.attn_q_bias, 1)  # (n_tokens, n_embd_q)
        Kmul = trace("Kcur", il, ops.linear(attn_norm, layer.attn_k), 0)  # (n_tokens, n_embd_kv)
        Kbias = trace("Kcur", il, Kmul + layer.attn_k_bias, 1)  # (n_tokens, n_embd_kv)
        Vmul = trace("Vcur", il, ops.linear(attn_norm, layer.attn_v), 0)  # (n_tokens, n_embd_kv)
        Vcur = trace("Vcur", il, Vmul + layer.attn_v_bias)  # (n_tokens, n_embd_kv)
        Qcur = trace("Qcur", il, ops.rope_neox(Qbias.reshape(head_shape), angles))  # (n_tokens, n_head, head_dim)
        Kcur = trace("Kcur", il, ops.rope_neox(Kbias.reshape(head_shape_kv), angles))  # (n_tokens, n_head_kv, head_dim)

        ops.kv_append(kv.k[il], Kcur, batch.slots)
        ops.kv_append(kv.v[il], Vcur.reshape(head_shape_kv), batch.slots)
        heads = ops.attention(
            Qcur,
            kv.k[il],
            kv.v[il],
            batch,
            scale=scale,
            window=cfg.swa_window(il),
            sinks=layer.attn_sinks,
            probe=partial(trace, il=il),
        )
        kqv_out = trace("kqv_out", il, heads)  # (n_tokens, n_embd_q)
        projected = ops.linear(kqv_out, layer.attn_output, layer.attn_output_bias)
        attn_out = trace("attn_out", il, projected)  # (n_tokens, n_embd)
        ffn_inp = trace("ffn_inp", il, attn_out + inpL)  # (n_tokens, n_embd)

        normed = ops.rms_norm(ffn_inp, layer.post_attention_norm, cfg.norm_eps)
        attn_post_norm = trace("attn_post_norm", il, normed)  # (n_tokens, n_embd)
        router = ops.linear(attn_post_norm, layer.ffn_gate_inp)
        ffn_moe_logits = trace("ffn_moe_logits", il, router)  # (n_tokens, n_expert)
        ffn_moe_probs = trace("ffn_moe_probs", il, ffn_moe_logits + layer.ffn_gate_inp_bias)  # (n_tokens, n_expert)
        chosen = ops.top_experts(ffn_moe_probs, cfg.n_expert_used)
        ffn_moe_topk = trace("ffn_moe_topk", il, chosen)  # (n_tokens, n_expert_used) int
        selected = ops.take_experts(ffn_moe_probs, ffn_moe_topk)
        ffn_moe_weights = trace("ffn_moe_weights", il, selected)  # (n_tokens, n_expert_used)
        shares = ops.row_soft_max(ffn_moe_weights)
        ffn_moe_weights_softmax = trace("ffn_moe_weights_softmax", il, shares)  # (n_tokens, n_expert_used)

        x = attn_post_norm[:, None, :]  # (n_tokens, 1, n_embd), the same for every expert
        ups = ops.linear_experts(x, layer.ffn_up_exps, ffn_moe_topk)
        up = trace("ffn_moe_up", il, ups)  # (n_tokens, n_expert_used, n_ff_exp)
        up_biased = trace("ffn_moe_up_biased", il, up + layer.ffn_up_exps_bias[ffn_moe_topk])  # same
        gate = trace("ffn_moe_gate", il, ops.linear_experts(x, layer.ffn_gate_exps, ffn_moe_topk))  # same
        gate_biased = trace("ffn_moe_gate_biased", il, gate + layer.ffn_gate_exps_bias[ffn_moe_topk])  # same
        swiglu = trace("ffn_moe_swiglu_oai", il, ops.swiglu_clamped(gate_biased, up_biased))  # same
        experts = ops.linear_experts(swiglu, layer.ffn_down_exps, ffn_moe_topk)
        down = trace("ffn_moe_down", il, experts)  # (n_tokens, n_expert_used, n_embd)
        down_biased = trace("ffn_moe_down_biased", il, down + layer.ffn_down_exps_bias[ffn_moe_topk])  # same
        weighted = trace("ffn_moe_weighted", il, down_biased * ffn_moe_weights_softmax[:, :, None])  # same
        ffn_moe_out = trace("ffn_moe_out", il, ops.sum_experts(weighted))  # (n_tokens, n_embd)
        l_out = trace("l_out", il, ffn_moe_out + ffn_inp)  # (n_tokens, n_embd)
        inpL = l_out

    out = ops.rows(inpL, batch.rows)  # (n_out, n_embd)
    result_norm = trace("result_norm", None, ops.rms_norm(out, w.output_norm, cfg.norm_eps))  # (n_out, n_embd)
    return trace("result_output", None, ops.linear(result_norm, w.output))  # (n_out, n_vocab)


def decode(cfg: ModelConfig, w: Weights, ops: DecodeOps, trace: DecodeTrace) -> Value:
    """`forward` for n rows, in as few launches as `ops` makes of it. (n_out, n_vocab)"""
    angles = ops.rope_angles(cfg.rope)
    scale = 1.0 / math.sqrt(cfg.head_dim)

    inpL = ops.embedding(w.token_embd)  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = ops.rms_norm(inpL, layer.attn_norm, cfg.norm_eps)  # (n, n_embd)
        Qbias = ops.linear(attn_norm, layer.attn_q, layer.attn_q_bias)  # (n, n_embd_q)
        Kbias = ops.linear(attn_norm, layer.attn_k, layer.attn_k_bias)  # (n, n_embd_kv)
        Vcur = ops.linear(attn_norm, layer.attn_v, layer.attn_v_bias)  # (n, n_embd_kv)
        Qcur = ops.rope_neox(ops.heads(Qbias, cfg.n_head), angles)  # (n, n_head, head_dim)
        Kcur = ops.rope_neox(ops.heads(Kbias, cfg.n_head_kv), angles)  # (n, n_head_kv, head_dim)
        Vheads = ops.heads(Vcur, cfg.n_head_kv)  # (n, n_head_kv, head_dim)
        window, sinks = cfg.swa_window(il), layer.attn_sinks
        kqv_out = ops.attention(il, Qcur, Kcur, Vheads, scale=scale, window=window, sinks=sinks)  # (n, n_embd_q)
        attn_out = ops.linear(kqv_out, layer.attn_output, layer.attn_output_bias)  # (n, n_embd)
        ffn_inp = ops.add(attn_out, inpL)  # (n, n_embd)

        attn_post_norm = ops.rms_norm(ffn_inp, layer.post_attention_norm, cfg.norm_eps)  # (n, n_embd)
        ffn_moe_probs = ops.linear(attn_post_norm, layer.ffn_gate_inp, layer.ffn_gate_inp_bias)  # (n, n_expert)
        ffn_moe_topk = ops.top_experts(ffn_moe_probs, cfg.n_expert_used)  # (n, n_expert_used)
        ffn_moe_weights = ops.take_experts(ffn_moe_probs, ffn_moe_topk)  # (n, n_expert_used)
        shares = ops.row_soft_max(ffn_moe_weights)  # (n, n_expert_used)

        topk, up_bias, gate_bias = ffn_moe_topk, layer.ffn_up_exps_bias, layer.ffn_gate_exps_bias
        up = ops.linear_experts(attn_post_norm, layer.ffn_up_exps, topk, up_bias)  # (n, n_expert_used, n_ff_exp)
        gate = ops.linear_experts(attn_post_norm, layer.ffn_gate_exps, topk, gate_bias)  # same
        swiglu = ops.swiglu_clamped(gate, up)  # same
        down = ops.linear_experts(swiglu, layer.ffn_down_exps, topk, layer.ffn_down_exps_bias)  # (n, …, n_embd)
        ffn_moe_out = ops.sum_experts(down, shares)  # (n, n_embd)
        l_out = ops.add(ffn_moe_out, ffn_inp)  # (n, n_embd)
        trace("l_out", il, l_out)
        inpL = l_out

    out = ops.rows(inpL)  # (n_out, n_embd)
    result_norm = ops.rms_norm(out, w.output_norm, cfg.norm_eps)  # (n_out, n_embd)
    return ops.linear(result_norm, w.output)  # (n_out, n_vocab)
