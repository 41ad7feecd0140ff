"""The haiku models in PyTorch, for training only: `qwen2`, and `gpt-oss` with its experts, sinks, window and YaRN.

Parameters bear the GGUF names and shapes (tools/model_specs.py), so that a checkpoint is a GGUF file's tensors without
more ado. The forward passes follow refengine/models/qwen2.py and gpt_oss.py, whole rows at a time and without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refengine.config import RopeConfig
from refengine.ops.rope import rope_angles
from tools.model_specs import ModelSpec, tensors

BALANCE = 0.01  # weight of the experts' balance loss (Fedus et al. 2021, Switch Transformers, eq. 4)


class HaikuModel(torch.nn.Module):
    """`logits, balance_loss = model(ids)` for ids (n_rows, n_tokens)."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        super().__init__()
        self.spec = spec
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterDict()  # by GGUF name, with `/` for its dots, which PyTorch reserves
        for tensor in tensors(spec):
            self.weights[_key(tensor.name)] = torch.nn.Parameter(_initial(tensor.name, tensor.shape, spec, generator))
        cos, sin = rope_angles(np.arange(spec.n_ctx), _rope(spec))
        self.register_buffer("cos", torch.from_numpy(cos[:, 0]), persistent=False)  # (n_ctx, head_dim / 2)
        self.register_buffer("sin", torch.from_numpy(sin[:, 0]), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        w, spec, n = self.weights, self.spec, ids.shape[1]
        x = F.embedding(ids, w[_key("token_embd.weight")])  # (n_rows, n_tokens, n_embd)
        balance = x.new_zeros(())
        feed_forward_norm = "ffn_norm" if spec.arch == "qwen2" else "post_attention_norm"
        for il in range(spec.n_layer):
            layer = {k.removeprefix(f"blk/{il}/"): v for k, v in w.items() if k.startswith(f"blk/{il}/")}
            x = x + self._attention(self._norm(x, layer["attn_norm/weight"]), layer, il, n)
            normed = self._norm(x, layer[feed_forward_norm + "/weight"])
            if spec.arch == "qwen2":
                hidden = F.silu(normed @ layer["ffn_gate/weight"].T) * (normed @ layer["ffn_up/weight"].T)
                x = x + hidden @ layer["ffn_down/weight"].T
            else:
                out, loss = self._experts(normed, layer)
                x, balance = x + out, balance + loss
        head = w[_key("token_embd.weight" if spec.tied else "output.weight")]
        return self._norm(x, w[_key("output_norm.weight")]) @ head.T, balance

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.spec.norm_eps)

    def _attention(self, x: Tensor, layer: Mapping[str, Tensor], il: int, n: int) -> Tensor:
        spec = self.spec
        parts = []
        for name, n_head in (("attn_q", spec.n_head), ("attn_k", spec.n_head_kv), ("attn_v", spec.n_head_kv)):
            made = F.linear(x, layer[f"{name}/weight"], layer[f"{name}/bias"])
            parts.append(made.view(*made.shape[:2], n_head, spec.head_dim).transpose(1, 2))
        q, k, v = self._rotate(parts[0], n), self._rotate(parts[1], n), parts[2]  # (n_rows, heads, n_tokens, head_dim)
        k, v = (t.repeat_interleave(spec.n_head // spec.n_head_kv, dim=1) for t in (k, v))
        if spec.arch == "qwen2":
            heads = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        else:
            scores = q.to(v.dtype) @ k.to(v.dtype).transpose(-1, -2) / math.sqrt(spec.head_dim)
            steps = torch.arange(n, device=x.device)
            distance = steps[:, None] - steps[None, :]
            window = spec.n_swa if il % 2 == 0 else n  # llama.cpp: every second layer slides, the first one does
            scores = scores.float().masked_fill((distance < 0) | (distance >= window), -torch.inf)
            sinks = layer["attn_sinks/weight"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            heads = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v
        joined = heads.transpose(1, 2).flatten(2)
        return F.linear(joined, layer["attn_output/weight"], layer.get("attn_output/bias"))

    def _rotate(self, x: Tensor, n: int) -> Tensor:
        """NEOX: pairs (i, i + head_dim / 2)."""
        cos, sin = self.cos[:n], self.sin[:n]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def _experts(self, x: Tensor, layer: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Every expert computes every token (they are few and small); those not chosen get weight zero."""
        spec = self.spec
        router = F.linear(x.float(), layer["ffn_gate_inp/weight"], layer["ffn_gate_inp/bias"]).float()
        chosen = router.topk(spec.n_expert_used, dim=-1)
        shares = torch.softmax(chosen.values, dim=-1)
        weight = torch.zeros_like(router).scatter(-1, chosen.indices, shares)  # (n_rows, n_tokens, n_expert)
        gate = torch.einsum("bti,eoi->bteo", x, layer["ffn_gate_exps/weight"]) + layer["ffn_gate_exps/bias"]
        up = torch.einsum("bti,eoi->bteo", x, layer["ffn_up_exps/weight"]) + layer["ffn_up_exps/bias"]
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        down = torch.einsum("btei,eoi->bteo", hidden, layer["ffn_down_exps/weight"]) + layer["ffn_down_exps/bias"]
        load = (weight > 0).float().mean((0, 1)) / spec.n_expert_used
        balance = spec.n_expert * (load * torch.softmax(router, dim=-1).mean((0, 1))).sum()
        return (down * weight.unsqueeze(-1)).sum(2), balance

    def state(self) -> dict[str, Tensor]:
        """Parameters by GGUF name, on the CPU."""
        return {name.replace("/", "."): p.detach().cpu() for name, p in self.weights.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters by GGUF name. Raises KeyError for one that is missing, ValueError for surplus ones."""
        surplus = state.keys() - {name.replace("/", ".") for name in self.weights}
        if surplus:
            raise ValueError(f"unknown parameters: {', '.join(sorted(surplus))}")
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(state[name.replace("/", ".")])


def _key(gguf_name: str) -> str:
    return gguf_name.replace(".", "/")


def _initial(name: str, shape: tuple[int, ...], spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """Ones for norms, zeros for biases and sinks, normal values for matrices, smaller where a block ends (GPT-2)."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith((".bias", "attn_sinks.weight")):
        return torch.zeros(shape)
    ends_block = ".attn_output." in name or ".ffn_down" in name
    std = 0.02 / math.sqrt(2 * spec.n_layer) if ends_block else 0.02
    return torch.randn(shape, generator=generator) * std


def _rope(spec: ModelSpec) -> RopeConfig:
    return RopeConfig(
        n_rot=spec.head_dim,
        freq_base=spec.rope_base,
        freq_scale=1.0 / spec.rope_factor if spec.rope_factor else 1.0,
        n_ctx_orig=spec.n_ctx_orig or spec.n_ctx,
        ext_factor=1.0 if spec.rope_scaling == "yarn" else 0.0,
        attn_factor=1.0,
    )
