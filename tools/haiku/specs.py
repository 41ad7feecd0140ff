"""Shapes of the two haiku models."""

from __future__ import annotations

from tools.model_specs import ModelSpec

N_VOCAB = 2048
# n_embd and n_ff are multiples of 256, so that K-quants apply to every matrix.
DENSE = ModelSpec(
    arch="qwen2", type="F32", name="refengine haiku",
    n_layer=6, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=768,
    vocab="qwen2", n_vocab=N_VOCAB, n_ctx=512, tied=True, norm_eps=1e-6, rope_base=10000.0,
)  # fmt: skip
EXPERTS = ModelSpec(
    arch="gpt-oss", type="F32", name="refengine haiku, mixture of experts",
    n_layer=4, n_embd=128, n_head=4, n_head_kv=2, head_dim=64, n_ff=256, n_expert=4, n_expert_used=2, n_swa=32,
    vocab="qwen2", n_vocab=N_VOCAB, n_ctx=512,
    rope_base=150000.0, rope_scaling="yarn", rope_factor=4.0, n_ctx_orig=128,
)  # fmt: skip
SPECS = {"dense": DENSE, "experts": EXPERTS}
