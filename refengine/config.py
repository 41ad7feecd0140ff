"""`ModelConfig`: everything that the forward pass needs to know about a model besides its tensors.

Built once from GGUF metadata, and frozen. A required key that is missing, of the wrong type or out of
range is an error that names the key; nothing about a model is assumed. Defaults are llama.cpp's
(`llama_model_base::load_hparams` and each architecture's `load_arch_hparams`).

Independent of tensors, devices and arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from refengine.errors import ModelError
from refengine.gguf.file import GGUFFile

# llama.cpp's YaRN corner rotations (`llama_hparams::yarn_beta_fast/slow`). None of the architectures here reads
# them from the file.
YARN_BETA_FAST = 32.0
YARN_BETA_SLOW = 1.0

MAX_LAYERS = 10_000  # more layers than a file can have tensors for (llama.cpp allows 512)


@dataclass(frozen=True)
class Number:
    """A float of the metadata, from `low` to `high`. default: None where the key is required."""

    low: float
    high: float
    default: float | None = None


@dataclass(frozen=True)
class Traits:
    """How to read an architecture's metadata; defined in its model file.

    rope: which elements of a head RoPE pairs, `norm` (2i, 2i + 1) or `neox` (i, i + n_rot / 2); None: learned
    positions. rope_whole_head: refuse a file that rotates only a part of each head. layer_norm: LayerNorm instead of
    RMSNorm. experts: every feed-forward is a mixture of experts. sliding_window: some layers have a sliding window,
    which the file describes. numbers: constants of this architecture that have no field in `ModelConfig`, by their key
    without the architecture's prefix: `{"logit_scale": Number(1e-6, 1e6)}` reads the key `NAME.logit_scale` into
    `cfg.numbers["logit_scale"]`.
    """

    rope: str | None
    rope_whole_head: bool = False
    layer_norm: bool = False
    experts: bool = False
    sliding_window: bool = False
    numbers: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) with linear or YaRN scaling (Peng et al. 2023)."""

    n_rot: int  # rotated elements per head
    freq_base: float
    freq_scale: float  # 1 / scaling factor; 1.0 without scaling
    n_ctx_orig: int  # the context length of the training before scaling
    ext_factor: float  # 1.0 with YaRN, else 0.0
    attn_factor: float  # magnitude scale of cos and sin, before YaRN's own
    beta_fast: float = YARN_BETA_FAST
    beta_slow: float = YARN_BETA_SLOW


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of one model. Sizes count elements; names are llama.cpp's."""

    arch: str
    name: str
    n_vocab: int
    n_ctx_train: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int  # 0 if every feed-forward is a mixture of experts
    norm_eps: float  # of RMSNorm, or of LayerNorm for gpt2
    rope: RopeConfig | None
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    n_swa: int = 0  # sliding window in tokens, 0 = none
    swa_layers: tuple[bool, ...] = ()  # for each layer, whether it has a sliding window
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)  # the constants of `Traits.numbers`

    @property
    def n_embd_q(self) -> int:
        """The width of all query heads together, in elements."""
        return self.n_head * self.head_dim

    @property
    def n_embd_kv(self) -> int:
        """The width of all key (or value) heads together, in elements."""
        return self.n_head_kv * self.head_dim

    def swa_window(self, il: int) -> int:
        """The sliding window of layer `il` in tokens; 0 if the layer attends to all earlier positions."""
        return self.n_swa if self.swa_layers and self.swa_layers[il] else 0

    @staticmethod
    def from_gguf(gguf: GGUFFile, traits: Traits) -> ModelConfig:
        """Read the configuration of a model whose architecture has these traits.

        Raises `GGUFError` for a missing key or one of the wrong type, `ModelError` for other problems.
        """
        return _Reader(gguf, traits).read()


class _Reader:
    def __init__(self, gguf: GGUFFile, traits: Traits) -> None:
        self.gguf, self.traits = gguf, traits
        self.arch: str = gguf.get("general.architecture", str)

    def read(self) -> ModelConfig:
        n_layer = self.size("block_count", limit=MAX_LAYERS)
        n_embd = self.size("embedding_length")
        n_head = self.size("attention.head_count", per_layer=n_layer)
        n_head_kv = self.size("attention.head_count_kv", default=n_head, per_layer=n_layer)
        if n_head % n_head_kv:
            raise self.bad("attention.head_count_kv", f"{n_head} heads cannot share {n_head_kv} kv heads evenly")
        head_dim = self.head_dim(n_embd, n_head)
        n_ctx_train = self.size("context_length")
        is_moe = self.traits.experts
        n_expert = self.size("expert_count", default=0)
        if n_expert and not is_moe:
            raise self.bad("expert_count", f"mixture of experts is not supported for architecture {self.arch!r}")
        if is_moe and not n_expert:
            raise self.bad("expert_count", f"a {self.arch} model needs at least one expert")
        n_expert_used = self.size("expert_used_count", per_layer=n_layer) if is_moe else 0
        if n_expert_used > n_expert:
            raise self.bad("expert_used_count", f"{n_expert_used} experts used, but there are only {n_expert}")
        n_swa = self.size("attention.sliding_window") if self.traits.sliding_window else 0
        return ModelConfig(
            arch=self.arch,
            name=self.gguf.get("general.name", str, default=self.gguf.path.stem),
            n_vocab=self.n_vocab(),
            n_ctx_train=n_ctx_train,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=0 if is_moe else self.size("feed_forward_length", per_layer=n_layer),
            norm_eps=self.norm_eps(),
            rope=None if self.traits.rope is None else self.rope(head_dim, n_ctx_train),
            n_expert=n_expert,
            n_expert_used=n_expert_used,
            n_ff_exp=self.size("expert_feed_forward_length", per_layer=n_layer) if is_moe else 0,
            n_swa=n_swa,
            swa_layers=self.swa_layers(n_layer) if n_swa else (),
            numbers={k: self.number(k, n.low, n.high, n.default) for k, n in self.traits.numbers.items()},
        )

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def bad(self, name: str, message: str) -> ModelError:
        return ModelError(str(self.gguf.error(self.key(name), f"{self.key(name)}: {message}")))

    def size(
        self, name: str, *, default: int | None = None, per_layer: int | None = None, limit: int = 2**31 - 1
    ) -> int:
        """A positive count, or `default` if the key is absent. An array is accepted if all its values are equal."""
        key = self.key(name)
        if default is not None and key not in self.gguf.metadata:
            return default
        if per_layer is not None and not isinstance(self.gguf.metadata.get(key), (int, float, str, bool, type(None))):
            values = [int(v) for v in self.gguf.get(key, "ints")]
            if len(values) < per_layer or len(set(values[:per_layer])) != 1:
                raise self.bad(name, f"layers that differ are not supported (values {values[:8]}…)")
            value = values[0]
        else:
            value = self.gguf.get(key, int)
        if not (0 if default == 0 else 1) <= value <= limit:
            raise self.bad(name, f"value {value} is outside 1..{limit}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A float from low to high, both in the range of float32; or `default` if the key is absent.

        Without a default the key is required.
        """
        key = self.key(name)
        value = self.gguf.get(key, float) if default is None else self.gguf.get(key, float, default=default)
        if not low <= value <= high:  # also true for NaN
            raise self.bad(name, f"value {value} is outside {low:g}..{high:g}")
        return value

    def head_dim(self, n_embd: int, n_head: int) -> int:
        key_length = self.size("attention.key_length", default=n_embd // n_head)
        value_length = self.size("attention.value_length", default=n_embd // n_head)
        if key_length != value_length:
            raise self.bad("attention.value_length", f"heads of K ({key_length}) and V ({value_length}) must be equal")
        if key_length == 0:
            raise self.bad("attention.head_count", f"{n_head} heads do not fit an embedding of {n_embd}")
        if self.key("attention.key_length") not in self.gguf.metadata and n_embd % n_head:
            raise self.bad("attention.head_count", f"an embedding of {n_embd} does not divide into {n_head} heads")
        return key_length

    def n_vocab(self) -> int:
        """The length of the vocabulary; in a file without one, `<arch>.vocab_size` or the rows of the embedding."""
        if "tokenizer.ggml.tokens" in self.gguf.metadata:
            return len(self.gguf.get("tokenizer.ggml.tokens", "strs"))
        if self.key("vocab_size") not in self.gguf.metadata and "token_embd.weight" in self.gguf.tensors:
            return self.gguf.tensors["token_embd.weight"].shape[0]
        return self.size("vocab_size")

    def norm_eps(self) -> float:
        name = "attention.layer_norm_epsilon" if self.traits.layer_norm else "attention.layer_norm_rms_epsilon"
        eps = self.gguf.get(self.key(name), float)
        if not (math.isfinite(eps) and 0 <= eps < 1):
            raise self.bad(name, f"epsilon {eps} is outside 0..1")
        return eps

    def rope(self, head_dim: int, n_ctx_train: int) -> RopeConfig:
        n_rot = self.size("rope.dimension_count", default=head_dim)
        if n_rot > head_dim or n_rot % 2:
            raise self.bad("rope.dimension_count", f"cannot rotate {n_rot} of {head_dim} elements of a head")
        if self.traits.rope_whole_head and n_rot != head_dim:
            raise self.bad("rope.dimension_count", f"{n_rot} rotated elements, expected the whole head of {head_dim}")
        freq_base = self.number("rope.freq_base", 1.001, 1e30, 10000.0)
        if self.number("rope.freq_base_swa", 1.001, 1e30, freq_base) != freq_base:
            raise self.bad("rope.freq_base_swa", "a different base for sliding-window layers is not supported")
        scaling = self.gguf.get(self.key("rope.scaling.type"), str, default="linear")
        if scaling not in ("none", "linear", "yarn", "longrope"):
            raise self.bad("rope.scaling.type", f"unknown {scaling[:64]!r}; known: none, linear, yarn, longrope")
        factor_key = "rope.scaling.factor"
        if self.key(factor_key) not in self.gguf.metadata:
            factor_key = "rope.scale_linear"  # its old name
        factor = self.number(factor_key, 0.0, 1e9, 0.0)
        if 0.0 < factor < 1e-9:
            raise self.bad(factor_key, f"factor {factor} is too small")
        return RopeConfig(
            n_rot=n_rot,
            freq_base=freq_base,
            freq_scale=1.0 if factor == 0.0 or scaling == "none" else 1.0 / factor,
            n_ctx_orig=self.size("rope.scaling.original_context_length", default=n_ctx_train),
            ext_factor=1.0 if scaling == "yarn" else 0.0,
            attn_factor=self.number("rope.scaling.attn_factor", -1e9, 1e9, 1.0),
        )

    def swa_layers(self, n_layer: int) -> tuple[bool, ...]:
        """For each layer, whether it has a sliding window. The file may give a period or a list.

        llama.cpp's default for gpt-oss is a window in every even layer.
        """
        key = self.key("attention.sliding_window_pattern")
        value = self.gguf.metadata.get(key)
        if value is None or isinstance(value, int):
            period = 2 if value is None else self.size("attention.sliding_window_pattern", default=0)
            return tuple(period == 0 or il % period < period - 1 for il in range(n_layer))
        is_ints = isinstance(value, np.ndarray) and value.dtype.kind in "iu"
        flags = [bool(v) for v in self.gguf.get(key, "ints" if is_ints else "bools")]
        if len(flags) < n_layer:
            raise self.bad("attention.sliding_window_pattern", f"{len(flags)} entries for {n_layer} layers")
        return tuple(flags[:n_layer])
