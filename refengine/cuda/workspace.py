"""Computes how much temporary device memory kernels need, before anything is allocated.

Only arrays that exist at the same time are added up, so that no start is refused that could work.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from refengine.config import ModelConfig
from refengine.cuda.layout import PACKING_BYTES
from refengine.cuda.memory import settled
from refengine.cuda.upload import SLAB_BYTES
from refengine.weights import is_vector


def prompt_bytes(cfg: ModelConfig, n_tokens: int) -> int:
    """The bytes in the memory pool after a forward pass of `n_tokens` prompt tokens through one layer.

    A pass with `decode()` (`cuda.decode.prompt`) needs about half of it.
    """
    wide = cfg.n_expert_used * (5 * cfg.n_ff_exp + 3 * cfg.n_embd) if cfg.n_expert else 4 * cfg.n_ff
    return settled(4 * n_tokens * (6 * cfg.n_embd + 3 * (cfg.n_embd_q + cfg.n_embd_kv) + wide))


def packing_bytes(tensors: Iterable[Any]) -> int:
    """The temporary bytes for reordering the largest of some tensors (type, shape, n_bytes)."""
    most = 0
    for info in tensors:
        if not is_vector(info):
            n_weights = prod(info.shape)
            slab = min(SLAB_BYTES, info.n_bytes // prod(info.shape[:-2]))
            most = max(most, slab + PACKING_BYTES.get(info.type, 0) * (slab * n_weights // info.n_bytes))
    return most
