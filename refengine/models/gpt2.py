"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm with bias, fused Q·K·V with bias, tanh GELU.

Names and order as in llama.cpp's `src/models/gpt2.cpp`; shapes in NumPy order.
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

TRAITS = Traits(rope=None, layer_norm=True)


def tensors(cfg: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the file, in NumPy order (n_out, n_in)."""
    n_qkv = cfg.n_embd_q + 2 * cfg.n_embd_kv
    specs = {
        "token_embd.weight": TensorSpec((cfg.n_vocab, cfg.n_embd)),
        "position_embd.weight": TensorSpec((cfg.n_ctx_train, cfg.n_embd)),
        "output_norm.weight": TensorSpec((cfg.n_embd,)),
        "output_norm.bias": TensorSpec((cfg.n_embd,)),
        "output.weight": TensorSpec((cfg.n_vocab, cfg.n_embd), optional=True, same_as="token_embd.weight"),
    }
    for il in range(cfg.n_layer):
        specs |= {
            f"blk.{il}.attn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.attn_norm.bias": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.attn_qkv.weight": TensorSpec((n_qkv, cfg.n_embd)),
            f"blk.{il}.attn_qkv.bias": TensorSpec((n_qkv,)),
            f"blk.{il}.attn_output.weight": TensorSpec((cfg.n_embd, cfg.n_embd_q)),
            f"blk.{il}.attn_output.bias": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.ffn_norm.weight": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.ffn_norm.bias": TensorSpec((cfg.n_embd,)),
            f"blk.{il}.ffn_up.weight": TensorSpec((cfg.n_ff, cfg.n_embd)),
            f"blk.{il}.ffn_up.bias": TensorSpec((cfg.n_ff,)),
            f"blk.{il}.ffn_down.weight": TensorSpec((cfg.n_embd, cfg.n_ff)),
            f"blk.{il}.ffn_down.bias": TensorSpec((cfg.n_embd,)),
        }
    return specs


def forward(cfg: ModelConfig, w: Weights, batch: Batch, kv: KVCache, ops: Ops, trace: Tracer) -> Any:
    """Logits of the rows that `batch` asks for: (n_out, n_vocab). Fills the KV cache at the batch's slots."""
    n_tokens = len(batch.ids)
    head_shape, head_shape_kv = (n_tokens, cfg.n_head, cfg.head_dim), (n_tokens, cfg.n_head_kv, cfg.head_dim)
    k_start, v_start = cfg.n_embd_q, cfg.n_embd_q + cfg.n_embd_kv
    scale = 1.0 / math.sqrt(cfg.head_dim)

    embd = trace("embd", None, ops.embedding(w.token_embd, batch.ids))  # (n_tokens, n_embd)
    pos_embd = trace("pos_embd", None, ops.embedding(w.position_embd, batch.positions))  # (n_tokens, n_embd)
    inpL = trace("inpL", None, embd + pos_embd)  # (n_tokens, n_embd)
    for il, layer in enumerate(w.layers):
        normed = ops.layer_norm(inpL, layer.attn_norm, layer.attn_norm_bias, cfg.norm_eps)
        attn_norm = trace("attn_norm", il, normed)  # (n_tokens, n_embd)

        wqkv = trace("wqkv", il, ops.linear(attn_norm, layer.attn_qkv))  # (n_tokens, n_embd_q + 2 * n_embd_kv)
        wqkv_b = trace("wqkv_b", il, wqkv + layer.attn_qkv_bias)  # (n_tokens, n_embd_q + 2 * n_embd_kv)
        Qcur = trace("Qcur", il, wqkv_b[:, :k_start].reshape(head_shape))  # (n_tokens, n_head, head_dim)
        Kcur = trace("Kcur", il, wqkv_b[:, k_start:v_start].reshape(head_shape_kv))  # (n_tokens, n_head_kv, head_dim)
        Vcur = trace("Vcur", il, wqkv_b[:, v_start:].reshape(head_shape_kv))  # (n_tokens, n_head_kv, head_dim)

        ops.kv_append(kv.k[il], Kcur, batch.slots)
        ops.kv_append(kv.v[il], Vcur, batch.slots)
        heads = ops.attention(Qcur, kv.k[il], kv.v[il], batch, scale=scale, probe=partial(trace, il=il))
        kqv_out = trace("kqv_out", il, heads)  # (n_tokens, n_embd_q)
        projected = ops.linear(kqv_out, layer.attn_output, layer.attn_output_bias)
        attn_out = trace("attn_out", il, projected)  # (n_tokens, n_embd)
        ffn_inp = trace("ffn_inp", il, attn_out + inpL)  # (n_tokens, n_embd)

        ffn_normed = ops.layer_norm(ffn_inp, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)
        ffn_norm = trace("ffn_norm", il, ffn_normed)  # (n_tokens, n_embd)
        ffn_up = trace("ffn_up", il, ops.linear(ffn_norm, layer.ffn_up))  # (n_tokens, n_ff)
        ffn_up_b = trace("ffn_up_b", il, ffn_up + layer.ffn_up_bias)  # (n_tokens, n_ff)
        ffn_gelu = trace("ffn_gelu", il, ops.gelu(ffn_up_b))  # (n_tokens, n_ff)
        ffn_down = trace("ffn_down", il, ops.linear(ffn_gelu, layer.ffn_down))  # (n_tokens, n_embd)
        ffn_out = trace("ffn_out", il, ffn_down + layer.ffn_down_bias)  # (n_tokens, n_embd)
        l_out = trace("l_out", il, ffn_out + ffn_inp)  # (n_tokens, n_embd)
        inpL = l_out

    out = ops.rows(inpL, batch.rows)  # (n_out, n_embd)
    normed_out = ops.layer_norm(out, w.output_norm, w.output_norm_bias, cfg.norm_eps)
    result_norm = trace("result_norm", None, normed_out)  # (n_out, n_embd)
    return trace("result_output", None, ops.linear(result_norm, w.output))  # (n_out, n_vocab)


def decode(cfg: ModelConfig, w: Weights, ops: DecodeOps, trace: DecodeTrace) -> Value:
    """`forward` for n rows, in as few launches as `ops` makes of it. (n_out, n_vocab)"""
    scale = 1.0 / math.sqrt(cfg.head_dim)
    parts = (cfg.n_embd_q, cfg.n_embd_kv, cfg.n_embd_kv)

    inpL = ops.add(ops.embedding(w.token_embd), ops.position_embedding(w.position_embd))  # (n, n_embd)
    for il, layer in enumerate(w.layers):
        attn_norm = ops.layer_norm(inpL, layer.attn_norm, layer.attn_norm_bias, cfg.norm_eps)  # (n, n_embd)
        wqkv_b = ops.linear(attn_norm, layer.attn_qkv, layer.attn_qkv_bias)  # (n, n_embd_q + 2 * n_embd_kv)
        q, k, v = ops.split(wqkv_b, parts)
        Qcur, Kcur = ops.heads(q, cfg.n_head), ops.heads(k, cfg.n_head_kv)  # (n, n_head, head_dim)
        kqv_out = ops.attention(il, Qcur, Kcur, ops.heads(v, cfg.n_head_kv), scale=scale)  # (n, n_embd_q)
        attn_out = ops.linear(kqv_out, layer.attn_output, layer.attn_output_bias)  # (n, n_embd)
        ffn_inp = ops.add(attn_out, inpL)  # (n, n_embd)

        ffn_norm = ops.layer_norm(ffn_inp, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)  # (n, n_embd)
        ffn_up_b = ops.linear(ffn_norm, layer.ffn_up, layer.ffn_up_bias)  # (n, n_ff)
        ffn_gelu = ops.gelu(ffn_up_b)  # (n, n_ff)
        ffn_out = ops.linear(ffn_gelu, layer.ffn_down, layer.ffn_down_bias)  # (n, n_embd)
        l_out = ops.add(ffn_out, ffn_inp)  # (n, n_embd)
        trace("l_out", il, l_out)
        inpL = l_out

    out = ops.rows(inpL)  # (n_out, n_embd)
    result_norm = ops.layer_norm(out, w.output_norm, w.output_norm_bias, cfg.norm_eps)  # (n_out, n_embd)
    return ops.linear(result_norm, w.output)  # (n_out, n_vocab)
