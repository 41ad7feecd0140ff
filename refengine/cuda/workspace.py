"""Bytes of device memory that kernels need for a while: arithmetic alone, before anything is allocated.

Only arrays that live at the same time are added up: a start that could work must not be refused.
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
    """Bytes that the memory pool holds after `n_tokens` of a prompt have gone through one layer in one pass."""
    wide = cfg.n_expert_used * (5 * cfg.n_ff_exp + 3 * cfg.n_embd) if cfg.n_expert else 4 * cfg.n_ff
    return settled(4 * n_tokens * (6 * cfg.n_embd + 3 * (cfg.n_embd_q + cfg.n_embd_kv) + wide))


def packing_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that re-ordering the largest of some tensors (type, shape, n_bytes) takes beside its final place."""
    most = 0
    for info in tensors:
        if not is_vector(info):
            n_weights = prod(info.shape)
            slab = min(SLAB_BYTES, info.n_bytes // prod(info.shape[:-2]))
            most = max(most, slab + PACKING_BYTES.get(info.type, 0) * (slab * n_weights // info.n_bytes))
    return most
