"""Computes how many KV cache blocks fit into a device's memory, without allocating, so that a start can fail early.

Adds up the sizes of the engine's parts: the cache, the decode step, and one forward pass over a prompt.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from refengine.cache.paged import BLOCK_SIZE, KVCache
from refengine.config import ModelConfig
from refengine.cuda.ops import kv_bytes
from refengine.cuda.workspace import prompt_bytes as forward_bytes
from refengine.engine.engine import EngineOptions, default_cache_tokens
from refengine.engine.kernel_runner import prompt_bytes, step_bytes
from refengine.models import BY_ARCHITECTURE
from refengine.ops import profile

RESERVE = 0.1  # the part of the memory left by weights and decode step that stays free, for larger forward passes


@dataclass(frozen=True, eq=False)
class Capacity:
    """The bytes that an engine needs in addition to the weights, as a function of its number of KV cache blocks.

    options: `cache_tokens` is ignored, because it is the result. device: `cpu`, `host` or `cuda:N`.
    weights: only names, types and shapes are used; None on the CPU.
    asked_bytes: the requested size of the cache in bytes, or None. attention: as for `load`.
    """

    config: ModelConfig
    options: EngineOptions
    device: str
    weights: Any
    asked_bytes: int | None = None
    attention: str = "flash"

    def engine_options(self, n_blocks: int) -> EngineOptions:
        """The options with a cache of `n_blocks` blocks."""
        return replace(self.options, cache_tokens=n_blocks * BLOCK_SIZE)

    def cache_bytes(self, n_blocks: int) -> int:
        """The bytes of the keys and values of all layers."""
        cfg = self.config
        shape = (n_blocks, BLOCK_SIZE, cfg.n_head_kv, cfg.head_dim)
        if self.device == "cpu":
            return 2 * cfg.n_layer * prod(shape) * np.dtype(profile("exact").kv_dtype).itemsize
        return kv_bytes(2 * cfg.n_layer, shape)

    def decode_bytes(self, n_blocks: int) -> int:
        """The bytes of the fused decode step's buffers."""
        if self.device == "cpu":
            return 0
        place = "host" if self.device == "host" else "cuda"
        n_positions = min(self.config.n_ctx_train, n_blocks * BLOCK_SIZE)
        return self._step_bytes(place, n_positions)

    @functools.cache  # noqa: B019  A start needs the same few sizes many times, and then drops the object.
    def _step_bytes(self, place: str, n_positions: int) -> int:
        decode = getattr(BY_ARCHITECTURE[self.config.arch], "decode", None)
        return step_bytes(self.config, decode, self.weights, place, self.attention, self.options.n_running, n_positions)

    def prompt_bytes(self, n_blocks: int) -> int:
        """The bytes of the arrays of the longest forward pass over a prompt."""
        n_positions = min(self.config.n_ctx_train, n_blocks * BLOCK_SIZE)
        n_tokens = min(self.options.max_step_tokens, self.config.n_ctx_train - 1, n_positions)
        if self.device == "cpu":
            return forward_bytes(self.config, n_tokens)
        return self._prompt_bytes("host" if self.device == "host" else "cuda", n_tokens, n_positions)

    @functools.cache  # noqa: B019  As for `_step_bytes`.
    def _prompt_bytes(self, place: str, n_tokens: int, n_positions: int) -> int:
        decode = getattr(BY_ARCHITECTURE[self.config.arch], "decode", None)
        n_running = self.options.n_running
        return prompt_bytes(self.config, decode, self.weights, place, self.attention, n_running, n_tokens, n_positions)

    def needed_bytes(self, n_blocks: int) -> int:
        """The bytes of cache, decode step and forward pass together."""
        return self.cache_bytes(n_blocks) + self.decode_bytes(n_blocks) + self.prompt_bytes(n_blocks)

    @property
    def min_blocks(self) -> int:
        """The requested number of blocks, or 1 if none was requested. 0: less than one block was requested."""
        return 1 if self.asked_bytes is None else self.asked_bytes // self.cache_bytes(1)

    def blocks(self, free: int | None) -> int:
        """The number of blocks to allocate when the weights leave `free` bytes; 0 if `min_blocks` do not fit.

        free: None if the device does not report its free memory.
        """
        least = self.min_blocks
        if free is not None and self.needed_bytes(least) > free:
            return 0
        if self.asked_bytes is not None:
            return least
        if free is None:
            return KVCache.blocks_for(default_cache_tokens(self.options.n_running, self.config.n_ctx_train))
        useful = self.options.n_running * KVCache.blocks_for(self.config.n_ctx_train)

        def with_reserve(n_blocks: int) -> int:
            decode = self.decode_bytes(n_blocks)
            prompt = max(self.prompt_bytes(n_blocks), int(RESERVE * (free - decode)))
            return self.cache_bytes(n_blocks) + decode + prompt

        return max(least, bisect_right(range(1, useful + 1), free, key=with_reserve))
