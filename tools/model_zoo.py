"""The named models of tools/make_model.py: tiny ones for tests, and the target models at full size.

TINY has every architecture × tensor type as `<arch>-<type>`, with unusual sizes (6 heads over 3 kv heads, heads of 48,
rows of 96, 160, 224 and 288), and then named variants. ONE_EACH has the model that stands for each architecture. FULL
has the shapes and type mixtures of common model files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from refengine.models import BY_ARCHITECTURE
from tools.model_specs import ARCHITECTURES, PURE, ModelSpec
from tools.model_vocab import default_size


@dataclass(frozen=True)
class Family:
    """What the tiny models of one architecture have in common.

    odd: sizes whose rows divide into blocks of 32 only; by_256: sizes for blocks of 256, an odd number of them where
    that is cheap. vocab: a kind of tools/model_vocab.py. numbers: a value for every key of the architecture's
    `TRAITS.numbers` that has no default. common: other fields of ModelSpec. stands_for_it: the model of TINY that
    stands for the architecture in tests which run once an architecture; by default NAME-q4_k_m of by_256, which is
    then made. in_llamacpp: whether the llama.cpp that tests compare with has the architecture.
    """

    odd: Mapping[str, Any] = field(default_factory=lambda: sizes(96, 6, 3, 16, 224))
    by_256: Mapping[str, Any] = field(default_factory=lambda: sizes(256, 4, 2, 64, 768))
    vocab: str = "llama-spm"
    numbers: Mapping[str, float] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    stands_for_it: str = ""
    in_llamacpp: bool = True


def sizes(n_embd: int, n_head: int, n_head_kv: int, head_dim: int, n_ff: int) -> dict[str, Any]:
    """The sizes that every model has, in elements and heads."""
    return {"n_embd": n_embd, "n_head": n_head, "n_head_kv": n_head_kv, "head_dim": head_dim, "n_ff": n_ff}


_SPECIAL = {
    "llama": Family(stands_for_it="llama3-q4_k_m"),
    "qwen2": Family(
        odd=sizes(96, 2, 1, 48, 224),
        by_256=sizes(256, 8, 2, 32, 768),
        vocab="qwen2",
        common={"tied": True, "norm_eps": 1e-6, "rope_base": 1e6},
        stands_for_it="qwen2-q4_k_m",
    ),
    "qwen3": Family(
        odd=sizes(96, 6, 3, 48, 224),
        by_256=sizes(256, 4, 2, 128, 768),
        vocab="qwen2",
        common={"norm_eps": 1e-6, "rope_base": 1e6},
    ),
    "phi3": Family(
        odd=sizes(96, 2, 2, 48, 160),
        by_256=sizes(256, 4, 4, 64, 768),
        vocab="phi-3",
        stands_for_it="phi3-mostly_q4_0",
    ),
    "gpt-oss": Family(
        odd=sizes(96, 6, 3, 48, 224),
        by_256=sizes(256, 8, 2, 32, 256),
        vocab="gpt-4o",
        common={
            "rope_base": 150000.0,
            **{"rope_scaling": "yarn", "rope_factor": 32.0, "n_ctx_orig": 64, "n_swa": 16},
            **{"n_expert": 4, "n_expert_used": 2, "n_layer": 2, "n_ctx": 2048},
        },
        stands_for_it="gpt-oss-mxfp4_moe",
    ),
    "gpt2": Family(
        odd=sizes(96, 6, 6, 16, 224),
        by_256=sizes(256, 4, 4, 64, 768),
        vocab="gpt-2",
        common={"tied": True},
        stands_for_it="gpt2-q5_1",
    ),
}
# An architecture that is not named here has the defaults, which are small Llamas.
FAMILIES: dict[str, Family] = {arch: _SPECIAL.get(arch, Family()) for arch in ARCHITECTURES}


def tiny(arch: str, type: str, **overrides: Any) -> ModelSpec:
    """A small model of an architecture and type. Overrides are fields of ModelSpec. Raises ValueError if invalid."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    by_256 = type in PURE and GGML_QUANT_SIZES[GGMLQuantizationType[type]][0] == 256
    family = FAMILIES[arch]
    fields = {"n_layer": 3, "vocab": family.vocab, "numbers": family.numbers, **family.common}
    fields |= {**(family.by_256 if by_256 else family.odd), **overrides}
    fields.setdefault("n_vocab", default_size(fields["vocab"]))
    required = {name for name, number in BY_ARCHITECTURE[arch].TRAITS.numbers.items() if number.default is None}
    if required - set(fields["numbers"]):
        raise ValueError(f"{arch} needs numbers {sorted(required)}: give them in its Family in tools/model_zoo.py")
    unknown = set(overrides) - set(ModelSpec.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}; known: {', '.join(ModelSpec.__dataclass_fields__)}")
    return ModelSpec(arch=arch, type=type, **fields)


def _q4_k_m(arch: str) -> dict[str, ModelSpec]:
    """The mixture that most files have, of rows that Q4_K's blocks divide."""
    return {f"{arch}-q4_k_m": tiny(arch, "Q4_K_M", **FAMILIES[arch].by_256)}


_LLAMA3 = {"vocab": "llama-bpe", "rope_base": 500000.0, "rope_freqs": True}

TINY: dict[str, ModelSpec] = {f"{a}-{t.lower()}": tiny(a, t) for a in ARCHITECTURES for t in PURE} | {
    # llama: llama-3 frequency factors; heads wider than n_embd / n_head; linear scaling; rows of 896; no vocabulary
    "llama3-f32": tiny("llama", "F32", **_LLAMA3),
    "llama3-q4_k_m": tiny("llama", "Q4_K_M", **FAMILIES["llama"].by_256, **_LLAMA3),
    "llama-f32-wide-heads": tiny("llama", "F32", head_dim=48),
    "llama-f32-linear": tiny("llama", "F32", rope_scaling="linear", rope_factor=4.0),
    "llama-f32-no-vocab": tiny("llama", "F32", vocab="none", n_vocab=97),
    "llama-f32-tied": tiny("llama", "F32", tied=True),
    "llama-q8_0-896": tiny("llama", "Q8_0", n_layer=1, n_embd=896, n_head=2, n_head_kv=1, head_dim=64, n_ff=96),
    # the mixture of the real Qwen2.5-0.5B file: rows of n_embd fall back to Q5_0 and Q8_0, ffn_down is Q4_K and Q6_K
    "qwen2-q4_k_m": tiny("qwen2", "Q4_K_M", n_embd=288, n_head=6, n_head_kv=3, n_ff=768),
    "qwen2-f32-untied": tiny("qwen2", "F32", tied=False),
    **_q4_k_m("phi3"),
    "phi3-mostly_q4_0": tiny("phi3", "MOSTLY_Q4_0", **FAMILIES["phi3"].by_256),  # output in Q6_K
    "qwen2-mostly_q4_0": tiny("qwen2", "MOSTLY_Q4_0"),  # tied head in Q8_0
    "phi3-f32-longrope": tiny("phi3", "F32", rope_scaling="longrope", n_ctx_orig=256),
    "phi3-q4_0-gqa": tiny("phi3", "Q4_0", n_head=6, n_head_kv=2, head_dim=16),
    "phi3-f32-window": tiny("phi3", "F32", n_swa=16),  # llama.cpp ignores phi3's window
    "gpt-oss-mxfp4_moe": tiny("gpt-oss", "MXFP4_MOE"),
    "gpt-oss-f32-three-of-five": tiny("gpt-oss", "F32", n_expert=5, n_expert_used=3),
    "gpt2-f32-untied": tiny("gpt2", "F32", tied=False),
}
for _arch in ARCHITECTURES:
    if not FAMILIES[_arch].stands_for_it:
        TINY |= _q4_k_m(_arch)

ONE_EACH: dict[str, str] = {arch: family.stands_for_it or f"{arch}-q4_k_m" for arch, family in FAMILIES.items()}
IN_LLAMACPP: tuple[str, ...] = tuple(name for name, spec in TINY.items() if FAMILIES[spec.arch].in_llamacpp)

_PHI3_MINI: dict[str, Any] = {
    **{"n_layer": 32, "n_embd": 3072, "n_head": 32, "n_head_kv": 32, "head_dim": 96, "n_ff": 8192},
    **{"n_vocab": 32064, "n_ctx": 4096, "n_ctx_orig": 4096, "n_swa": 2047},
}

FULL: dict[str, ModelSpec] = {
    "qwen2.5-0.5b": tiny(
        "qwen2",
        "Q4_K_M",
        **{"n_layer": 24, "n_embd": 896, "n_head": 14, "n_head_kv": 2, "head_dim": 64, "n_ff": 4864},
        **{"n_vocab": 151936, "n_ctx": 32768, "name": "Qwen2.5-0.5B shape (random weights)"},
    ),
    "phi-3-mini": tiny("phi3", "Q4_K_M", **_PHI3_MINI, name="Phi-3-mini-4k shape (random weights)"),
    "phi-3-mini-q4_0": tiny("phi3", "MOSTLY_Q4_0", **_PHI3_MINI, name="Phi-3-mini-4k shape (random weights)"),
    "gpt-oss-20b": tiny(
        "gpt-oss",
        "MXFP4_MOE",
        **{"n_layer": 24, "n_embd": 2880, "n_head": 64, "n_head_kv": 8, "head_dim": 64, "n_ff": 2880},
        **{"n_vocab": 201088, "n_ctx": 131072, "n_ctx_orig": 4096, "n_swa": 128},
        **{"n_expert": 32, "n_expert_used": 4, "name": "gpt-oss-20b shape (random weights)"},
    ),
}
