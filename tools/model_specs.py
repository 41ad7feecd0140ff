"""The specification of a generated model: dimensions, metadata, tensors, and the type of each tensor.

Tensor names, shapes and metadata keys are those that llama.cpp's loader reads (src/models/*.cpp,
`llama_model_base::load_hparams`); type mixtures are those of its quantiser (src/llama-quant.cpp).
Shapes are in NumPy order: a matrix is (n_out, n_in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from refengine.models import BY_ARCHITECTURE
from tools.model_vocab import Entry

T, F, V = GGMLQuantizationType, LlamaFileType, GGUFValueType

ARCHITECTURES = tuple(BY_ARCHITECTURE)

# All matrices in one type, or a mixture as real files have it; with the `general.file_type` that llama.cpp gives it.
PURE = {
    "F32": F.ALL_F32,
    "F16": F.MOSTLY_F16,
    "BF16": F.MOSTLY_BF16,
    "Q4_0": F.MOSTLY_Q4_0,
    "Q4_1": F.MOSTLY_Q4_1,
    "Q5_0": F.MOSTLY_Q5_0,
    "Q5_1": F.MOSTLY_Q5_1,
    "Q8_0": F.MOSTLY_Q8_0,
    "Q4_K": F.MOSTLY_Q4_K_S,
    "Q5_K": F.MOSTLY_Q5_K_S,
    "Q6_K": F.MOSTLY_Q6_K,
    "MXFP4": F.MOSTLY_MXFP4_MOE,
}
MIXED = {"MOSTLY_Q4_0": F.MOSTLY_Q4_0, "Q4_K_M": F.MOSTLY_Q4_K_M, "MXFP4_MOE": F.MOSTLY_MXFP4_MOE}
TYPES = (*PURE, *MIXED)
K_FALLBACK = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}


@dataclass(frozen=True)
class ModelSpec:
    """One generated model. `type` is a name in TYPES; `vocab` is a kind of vocabulary of tools/model_vocab.py."""

    arch: str
    type: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    vocab: str
    n_vocab: int
    n_ctx: int = 512
    tied: bool = False  # no output.weight: the head is the embedding
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: str = ""  # "", "linear", "yarn" or "longrope"
    rope_factor: float = 0.0
    n_ctx_orig: int = 0
    rope_freqs: bool = False  # llama-3's per-frequency divisors
    n_expert: int = 0
    n_expert_used: int = 0
    n_swa: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)  # as `Traits.numbers`
    name: str = ""

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.arch!r}; known: {', '.join(ARCHITECTURES)}")
        if self.type not in TYPES:
            raise ValueError(f"unknown type {self.type!r}; known: {', '.join(TYPES)}")
        fixed_head = self.arch in ("qwen2", "phi3", "gpt2")
        if fixed_head and self.n_head * self.head_dim != self.n_embd:
            raise ValueError(f"{self.arch}: {self.n_head} heads of {self.head_dim} must make n_embd = {self.n_embd}")
        if self.n_head % self.n_head_kv or self.head_dim % 2:
            raise ValueError(f"{self.n_head} heads over {self.n_head_kv} kv heads of {self.head_dim} elements")
        if (self.arch == "gpt-oss") != bool(self.n_expert and self.n_expert_used):
            raise ValueError("gpt-oss, and only it, has n_expert and n_expert_used")
        if (self.arch == "gpt-oss" and not self.n_swa) or (self.n_swa and self.arch not in ("gpt-oss", "phi3")):
            raise ValueError("gpt-oss needs a sliding window n_swa; phi3 may have one (llama.cpp ignores it)")

    @property
    def file_type(self) -> int:
        return int((PURE | MIXED)[self.type])


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: normal values with a mean and standard deviation, or given values."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    std: float
    mean: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.n_elements // block_size * block_bytes


def use_more_bits(layer: int, n_layer: int) -> bool:
    """Whether Q4_K_M uses Q6_K for a layer's attn_v and ffn_down: in the first and last eighth, and every third one."""
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def matrix_type(spec: ModelSpec, role: str, layer: int, n_in: int) -> GGMLQuantizationType:
    """The type of a matrix with rows of `n_in`. `role` is its name without layer and `.weight`."""
    if role in ("ffn_gate_inp", "position_embd"):
        return T.F32
    if spec.type in PURE:
        chosen = T[spec.type]
        if n_in % GGML_QUANT_SIZES[chosen][0]:
            raise ValueError(f"{role}: rows of {n_in} are no multiple of {spec.type}'s {GGML_QUANT_SIZES[chosen][0]}")
        return chosen
    if spec.type == "MXFP4_MOE":
        return T.MXFP4 if role.endswith("_exps") else T.Q8_0
    is_head = role == "output" or (role == "token_embd" and spec.tied)
    if is_head:
        wanted = T.Q6_K
    elif spec.type == "MOSTLY_Q4_0":
        wanted = T.Q4_0
    elif role == "attn_qkv":
        wanted = T.Q5_K
    elif role in ("attn_v", "ffn_down") and use_more_bits(layer, spec.n_layer):
        wanted = T.Q6_K
    else:
        wanted = T.Q4_K
    return K_FALLBACK.get(wanted, wanted) if n_in % GGML_QUANT_SIZES[wanted][0] else wanted


def tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """All tensors in file order. Their scales keep activations near one, and spread the logits by about three."""
    n_embd, n_rot = spec.n_embd, spec.head_dim
    yield _matrix(spec, "token_embd", -1, spec.n_vocab, n_embd, std=3 / math.sqrt(n_embd) if spec.tied else 0.7)
    if spec.arch == "gpt2":
        yield _matrix(spec, "position_embd", -1, spec.n_ctx, n_embd, std=0.2)
    if spec.rope_freqs:
        yield _values("rope_freqs.weight", _ramp(n_rot // 2, 8.0))
    if spec.rope_scaling == "longrope":
        yield _values("rope_factors_long.weight", _ramp(n_rot // 2, 16.0))
        yield _values("rope_factors_short.weight", _ramp(n_rot // 2, 1.5))
    for layer in range(spec.n_layer):
        yield from _attention(spec, layer)
        yield from _feed_forward(spec, layer)
    yield _norm(spec, "output_norm", n_embd)
    if spec.arch == "gpt2":
        yield _bias("output_norm", n_embd)
    if not spec.tied:
        yield _matrix(spec, "output", -1, spec.n_vocab, n_embd, std=3 / math.sqrt(n_embd))


def _attention(spec: ModelSpec, layer: int) -> Iterator[TensorSpec]:
    at, n_embd = f"blk.{layer}.", spec.n_embd
    n_q, n_kv = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    yield _norm(spec, at + "attn_norm", n_embd)
    if spec.arch == "gpt2":
        yield _bias(at + "attn_norm", n_embd)
    fused = spec.arch in ("phi3", "gpt2")
    for role, n_out in (
        [("attn_qkv", n_q + 2 * n_kv)] if fused else [("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)]
    ):
        yield _matrix(spec, role, layer, n_out, n_embd)
        if spec.arch in ("qwen2", "gpt-oss", "gpt2"):
            yield _bias(at + role, n_out)
    if spec.arch == "qwen3":
        yield _norm(spec, at + "attn_q_norm", spec.head_dim)
        yield _norm(spec, at + "attn_k_norm", spec.head_dim)
    if spec.arch == "gpt-oss":
        yield TensorSpec(at + "attn_sinks.weight", (spec.n_head,), T.F32, std=1.0)
    yield _matrix(spec, "attn_output", layer, n_embd, n_q, gain=_residual_gain(spec))
    if spec.arch in ("gpt-oss", "gpt2"):
        yield _bias(at + "attn_output", n_embd)


def _feed_forward(spec: ModelSpec, layer: int) -> Iterator[TensorSpec]:
    at, n_embd, n_ff = f"blk.{layer}.", spec.n_embd, spec.n_ff
    yield _norm(spec, at + ("post_attention_norm" if spec.arch == "gpt-oss" else "ffn_norm"), n_embd)
    if spec.arch == "gpt2":
        yield _bias(at + "ffn_norm", n_embd)
    if spec.arch == "gpt-oss":
        yield _matrix(spec, "ffn_gate_inp", layer, spec.n_expert, n_embd, gain=2.0)
        yield _bias(at + "ffn_gate_inp", spec.n_expert)
    # phi3 keeps gate and up in one matrix, gpt2 has no gate
    rows = {"phi3": {"ffn_up": 2 * n_ff}, "gpt2": {"ffn_up": n_ff}}.get(spec.arch, {"ffn_gate": n_ff, "ffn_up": n_ff})
    for role, n_out in {**rows, "ffn_down": n_embd}.items():
        n_in, gain = (n_ff, 2 * _residual_gain(spec)) if role == "ffn_down" else (n_embd, 1.0)
        if spec.arch == "gpt-oss":
            yield _matrix(spec, role + "_exps", layer, n_out, n_in, gain=gain, n_expert=spec.n_expert)
            yield TensorSpec(f"{at}{role}_exps.bias", (spec.n_expert, n_out), T.F32, std=0.1)
        else:
            yield _matrix(spec, role, layer, n_out, n_in, gain=gain)
            if spec.arch == "gpt2":
                yield _bias(at + role, n_out)


def _matrix(
    spec: ModelSpec,
    role: str,
    layer: int,
    n_out: int,
    n_in: int,
    *,
    std: float = 0.0,
    gain: float = 1.0,
    n_expert: int = 0,
) -> TensorSpec:
    name = f"{role}.weight" if layer < 0 else f"blk.{layer}.{role}.weight"
    shape = (n_expert, n_out, n_in) if n_expert else (n_out, n_in)
    return TensorSpec(name, shape, matrix_type(spec, role, layer, n_in), std or gain / math.sqrt(n_in))


def _norm(spec: ModelSpec, name: str, n: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (n,), T.F32, std=0.1, mean=1.0)


def _bias(name: str, n: int) -> TensorSpec:
    return TensorSpec(f"{name}.bias", (n,), T.F32, std=0.1)


def _residual_gain(spec: ModelSpec) -> float:
    """The factor that keeps the residual stream near one for any number of layers."""
    return 1 / math.sqrt(2 * spec.n_layer)


def _values(name: str, values: tuple[float, ...]) -> TensorSpec:
    return TensorSpec(name, (len(values),), T.F32, std=0.0, values=values)


def _ramp(n: int, last: float) -> tuple[float, ...]:
    return tuple(1.0 + (last - 1.0) * i / (n - 1) for i in range(n))


def metadata(spec: ModelSpec) -> list[Entry]:
    """All metadata except `general.architecture` (added by the writer) and the vocabulary's keys."""

    def u32(key: str, value: int) -> Entry:
        return Entry(f"{spec.arch}.{key}", value, V.UINT32)

    def f32(key: str, value: float) -> Entry:
        return Entry(f"{spec.arch}.{key}", value, V.FLOAT32)

    entries = [
        Entry("general.name", spec.name or f"{spec.arch} {spec.type} (random weights)", V.STRING),
        Entry("general.file_type", spec.file_type, V.UINT32),
        Entry("general.quantization_version", 2, V.UINT32),
        u32("vocab_size", spec.n_vocab),
        u32("context_length", spec.n_ctx),
        u32("embedding_length", spec.n_embd),
        u32("block_count", spec.n_layer),
        u32("feed_forward_length", spec.n_ff),
        u32("attention.head_count", spec.n_head),
        u32("attention.head_count_kv", spec.n_head_kv),
    ]
    if spec.arch == "gpt2":
        return [*entries, f32("attention.layer_norm_epsilon", spec.norm_eps)]
    entries += [f32("attention.layer_norm_rms_epsilon", spec.norm_eps), f32("rope.freq_base", spec.rope_base)]
    entries += [f32(key, value) for key, value in spec.numbers.items()]
    if spec.arch not in ("qwen2", "qwen3", "gpt-oss"):  # their converters leave it out
        entries.append(u32("rope.dimension_count", spec.head_dim))
    if spec.arch in ("qwen3", "gpt-oss") or spec.n_head * spec.head_dim != spec.n_embd:
        entries += [u32("attention.key_length", spec.head_dim), u32("attention.value_length", spec.head_dim)]
    if spec.rope_scaling:
        entries.append(Entry(f"{spec.arch}.rope.scaling.type", spec.rope_scaling, V.STRING))
    if spec.rope_factor:
        entries.append(f32("rope.scaling.factor", spec.rope_factor))
    if spec.n_ctx_orig:
        entries.append(u32("rope.scaling.original_context_length", spec.n_ctx_orig))
    if spec.arch == "gpt-oss":
        entries += [
            u32("expert_count", spec.n_expert),
            u32("expert_used_count", spec.n_expert_used),
            u32("expert_feed_forward_length", spec.n_ff),
        ]
    if spec.n_swa:
        entries.append(u32("attention.sliding_window", spec.n_swa))
    return entries
