"""The cached state of the model and the worker, from which `/health` answers without asking the device.

The engine's thread replaces `State.load` as a whole, so a reader in another thread never sees a half-updated one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from refengine.engine.hooks import EngineStats
from refengine.model import Model
from refengine.tokenizer import Tokenizer
from refengine.weights import quant_kind

TOKENIZER_KINDS = {"ByteLevelBPE": "gguf-bpe", "SentencePieceBPE": "gguf-spm", "HFJsonTokenizer": "hf-json"}


@dataclass(frozen=True)
class ModelInfo:
    """Properties of the loaded model and its device, which never change."""

    model: str
    quant_kind: str
    tokenizer_kind: str | None
    vocab_size: int
    context_length: int
    device: str
    sm: str | None
    cuda_runtime_version: str | None
    active_expert_count: int | None

    @staticmethod
    def of(model: Model) -> ModelInfo:
        """Query the model and its device. Called once, in the thread that uses the device."""
        config, device = model.config, model.device
        on_gpu = device.name.startswith("cuda")
        return ModelInfo(
            model=config.name,
            quant_kind=quant_kind(model.gguf),
            tokenizer_kind=_tokenizer_kind(model.vocabulary),
            vocab_size=config.n_vocab,
            context_length=model.n_ctx,
            device=device.name,
            sm=f"sm_{device.xp.cuda.Device().compute_capability}" if on_gpu else None,
            cuda_runtime_version=_version(device.xp.cuda.runtime.runtimeGetVersion()) if on_gpu else None,
            active_expert_count=config.n_expert_used or None,
        )


@dataclass(frozen=True)
class Load:
    """Memory and load as the engine's thread last measured them. vram_bytes: bytes of device memory by purpose."""

    vram_bytes: dict[str, int] = field(default_factory=dict)
    engine: EngineStats = field(default_factory=EngineStats)


class State:
    """The worker's state.

    errors: the reasons why the worker is unhealthy, by cause; empty if it is healthy.
    resident: whether all of the model is in the memory of a GPU.
    """

    def __init__(self, model: ModelInfo) -> None:
        self.model = model
        self.started = time.monotonic()
        self.resident = model.device.startswith("cuda")
        self.errors: dict[str, str] = {}
        self.load = Load()

    @property
    def vram_bytes_used(self) -> int:
        return sum(self.load.vram_bytes.values())

    @property
    def uptime(self) -> float:
        return time.monotonic() - self.started

    def health(self) -> dict[str, Any]:
        """The JSON of GET /health."""
        model = self.model
        return {
            "status": "unhealthy" if self.errors else "healthy",
            "reasons": list(self.errors.values()),
            "model": model.model,
            "resident": self.resident,
            "quant_kind": model.quant_kind,
            "vram_bytes_used": self.vram_bytes_used,
            "vram_bytes": dict(self.load.vram_bytes),
            "tokenizer_kind": model.tokenizer_kind,
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
            "uptime_seconds": round(self.uptime, 3),
            "device": model.device,
            "sm": model.sm,
            "cuda_runtime_version": model.cuda_runtime_version,
            "active_expert_count": model.active_expert_count,
        }


def vram_of(model: Model) -> dict[str, int]:
    """Bytes of device memory by purpose; empty on the CPU."""
    return model.memory.accounted() if model.memory is not None and model.device.is_gpu else {}


def check_residency(model: Model) -> None:
    """Raises DeviceError if one of the model's buffers is not plain device memory. Does nothing on the CPU."""
    if model.memory is not None and model.device.is_gpu:
        model.memory.check_residency()


def _tokenizer_kind(tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else TOKENIZER_KINDS[type(tokenizer).__name__]


def _version(number: int) -> str:
    """CUDA's version number as text: 12090 is 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"
