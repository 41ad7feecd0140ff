"""How a device's memory is shared out: arithmetic alone, so that a start knows what it needs before it takes anything.

Of arrays that come and go, what is there at once is reckoned, and no more: a start that could work is not refused.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from refengine.cache.paged import BLOCK_SIZE, KVCache
from refengine.config import ModelConfig
from refengine.cuda.layout import PACKING_BYTES
from refengine.cuda.memory import settled
from refengine.cuda.ops import kv_bytes
from refengine.cuda.upload import SLAB_BYTES
from refengine.engine.engine import default_cache_tokens
from refengine.engine.kernel_runner import step_bytes
from refengine.models import BY_ARCHITECTURE
from refengine.ops import profile
from refengine.weights import is_vector
from refengine.worker.options import WorkerOptions

STEP_TOKENS = {"cpu": 128}  # a step of 512 there takes 0.1 s for a small model, and a prompt in smaller ones no longer
RESERVE = 0.1  # of what weights and the decode step leave: for passes that take more than the first prompt's


@dataclass(frozen=True, eq=False)
class Room:
    """Bytes that a worker takes beside its weights, with a KV cache of so many blocks. device: its name."""

    config: ModelConfig
    options: WorkerOptions
    device: str
    weights: Any  # of which the decode step's plan looks at names, types and shapes

    @property
    def max_batch(self) -> int:
        return self.options.max_batch if self.options.batching else 1

    @property
    def step_tokens(self) -> int:
        return self.options.max_step_tokens or STEP_TOKENS.get(self.device, 512)

    def kv(self, n_blocks: int) -> int:
        cfg = self.config
        shape = (n_blocks, BLOCK_SIZE, cfg.n_head_kv, cfg.head_dim)
        if self.device == "cpu":
            return 2 * cfg.n_layer * prod(shape) * np.dtype(profile("exact").kv_dtype).itemsize
        return kv_bytes(2 * cfg.n_layer, shape)

    def step(self, n_blocks: int) -> int:
        """Buffers of the decode step."""
        if self.device == "cpu":
            return 0
        place = "host" if self.device == "host" else "cuda"
        n_positions = min(self.config.n_ctx_train, n_blocks * BLOCK_SIZE)
        return self._step(place, n_positions)

    @functools.cache  # noqa: B019  a start asks for the same few again and again, and forgets all of it
    def _step(self, place: str, n_positions: int) -> int:
        decode = getattr(BY_ARCHITECTURE[self.config.arch], "decode", None)
        given = (self.options.attention, self.max_batch, n_positions)
        return step_bytes(self.config, decode, self.weights, place, *given)

    def prompt(self, n_blocks: int) -> int:
        """The arrays of a layer for the longest part of a prompt, as the pool keeps them."""
        cfg = self.config
        n_tokens = min(self.step_tokens, cfg.n_ctx_train - 1, n_blocks * BLOCK_SIZE)
        wide = cfg.n_expert_used * (5 * cfg.n_ff_exp + 3 * cfg.n_embd) if cfg.n_expert else 4 * cfg.n_ff
        return settled(4 * n_tokens * (6 * cfg.n_embd + 3 * (cfg.n_embd_q + cfg.n_embd_kv) + wide))

    def needed(self, n_blocks: int) -> int:
        return self.kv(n_blocks) + self.step(n_blocks) + self.prompt(n_blocks)

    @property
    def least_blocks(self) -> int:
        """Of the cache that was asked for, or of the smallest that there is. 0: less than that was asked for."""
        given = self.options.kv_cache_size_mb
        return 1 if given is None else (given << 20) // self.kv(1)

    def blocks(self, free: int | None) -> int:
        """Of the cache where so many bytes are free once the weights are loaded; 0: too few. None: not on a GPU."""
        least = self.least_blocks
        if free is not None and self.needed(least) > free:
            return 0
        if self.options.kv_cache_size_mb is not None:
            return least
        if free is None:
            return KVCache.blocks_for(default_cache_tokens(self.max_batch, self.config.n_ctx_train))
        wanted = self.max_batch * KVCache.blocks_for(self.config.n_ctx_train)

        def with_reserve(n_blocks: int) -> int:
            step = self.step(n_blocks)
            return self.kv(n_blocks) + step + max(self.prompt(n_blocks), int(RESERVE * (free - step)))

        return max(least, bisect_right(range(1, wanted + 1), free, key=with_reserve))


def packing(tensors: Iterable[Any]) -> int:
    """What putting tensors (type, shape, n_bytes) onto a GPU takes at a time, beside the place where they go."""
    most = 0
    for info in tensors:
        if not is_vector(info):
            n_weights = prod(info.shape)
            slab = min(SLAB_BYTES, info.n_bytes // prod(info.shape[:-2]))
            most = max(most, slab + PACKING_BYTES.get(info.type, 0) * (slab * n_weights // info.n_bytes))
    return most
