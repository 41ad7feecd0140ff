"""One file for each architecture: what its metadata mean, its tensors, and its forward pass, top to bottom.

A model file has `TRAITS`, `tensors(cfg)` and `forward(cfg, w, batch, kv, ops, trace)`, and may have `decode(cfg, w,
ops, trace)`, the forward pass of one new token for each of several sequences; without it, tokens go through `forward`.
A new architecture is such a file and its line in `BY_ARCHITECTURE`.
"""

from __future__ import annotations

from types import ModuleType

from refengine.config import ModelConfig
from refengine.errors import ModelError
from refengine.gguf.file import GGUFFile
from refengine.models import gpt2, gpt_oss, llama, phi3, qwen2, qwen3

BY_ARCHITECTURE: dict[str, ModuleType] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gpt-oss": gpt_oss,
    "gpt2": gpt2,
}


def architecture_of(gguf: GGUFFile) -> ModuleType:
    """The model file of a GGUF file's architecture. Raises `GGUFError` where none is named, `ModelError` for others."""
    name: str = gguf.get("general.architecture", str)
    if name not in BY_ARCHITECTURE:
        known = ", ".join(BY_ARCHITECTURE)
        raise ModelError(f"{gguf.path}: architecture {name[:64]!r} is not supported; supported: {known}")
    return BY_ARCHITECTURE[name]


def read_config(gguf: GGUFFile) -> ModelConfig:
    """The configuration in a GGUF file's metadata, read as its architecture means it. Raises as `architecture_of`."""
    return ModelConfig.from_gguf(gguf, architecture_of(gguf).TRAITS)
