"""One file for each architecture: how to read its metadata, its tensors, and its forward pass.

A model file has `TRAITS`, `tensors(cfg)` and `forward(cfg, w, batch, kv, ops, trace)`, and may have `decode(cfg, w,
ops, trace)`, the forward pass of one new token for each of several sequences; without it, tokens go through `forward`.
To add an architecture, add such a file and its line in `BY_ARCHITECTURE`.
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
    """The module of a GGUF file's architecture. Raises `GGUFError` if the file names none, `ModelError` for others."""
    name: str = gguf.get("general.architecture", str)
    if name not in BY_ARCHITECTURE:
        known = ", ".join(BY_ARCHITECTURE)
        raise ModelError(f"{gguf.path}: architecture {name[:64]!r} is not supported; supported: {known}")
    return BY_ARCHITECTURE[name]


def read_config(gguf: GGUFFile) -> ModelConfig:
    """The configuration in a GGUF file. Raises the errors of `architecture_of` and `ModelConfig.from_gguf`."""
    return ModelConfig.from_gguf(gguf, architecture_of(gguf).TRAITS)
