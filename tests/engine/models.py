"""Small models for engine tests, and what a sequence gives when it runs alone."""

from pathlib import Path
from typing import Any

import numpy as np

import refengine
from refengine.cache.paged import KVCache
from refengine.engine.generation import Generation
from refengine.model import Model
from tools.make_model import write_model


class SmallBlocks:
    """A model whose caches have blocks of a few positions, so that short texts fill several."""

    def __init__(self, model: Model, block_size: int) -> None:
        self._model, self._block_size = model, block_size
        self.n_fed = 0  # ids that went through the model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_cache(self, n_tokens: int, n_sequences: int = 1) -> KVCache:
        cfg, ops = self._model.config, self._model.ops
        return KVCache(
            ops.kv_arrays,
            cfg.n_layer,
            cfg.n_head_kv,
            cfg.head_dim,
            n_ctx=self.n_ctx,
            n_blocks=KVCache.blocks_for(n_tokens, self._block_size) * n_sequences,
            block_size=self._block_size,
            copy_block=ops.kv_copy,
        )

    def evaluate(self, parts: Any, *rest: Any, **named: Any) -> Any:
        self.n_fed += sum(len(ids) for _, ids in parts)
        return self._model.evaluate(parts, *rest, **named)


def one_layer(folder: Path, device: str, arch: str = "qwen2", kind: str = "F32", n_ctx: int | None = None) -> Model:
    path = folder / f"{arch}-{kind}.gguf"
    if not path.exists():
        write_model(path, arch, kind, n_layer=1)
    return refengine.load(path, device, n_ctx=n_ctx)


def logits_alone(model: Model, generation: Generation) -> np.ndarray:
    """The logits that each generated token was to be drawn from: the whole text in one pass, nothing beside it."""
    return model.forward(generation.ids[:-1])[generation.n_prompt - 1 :]


def random_ids(rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(3, 300, n).tolist()
