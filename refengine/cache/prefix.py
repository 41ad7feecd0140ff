"""Blocks of the KV cache that are kept for the next prompt which begins alike.

A full block is known by a chained hash of the token ids up to its end, begun with the model's identity; a hit is
verified by the ids themselves. Sequences share blocks by reference; the cache holds one reference to each, and gives
the least recently used ones back when the pool runs short. Kernels add in an order of positions alone, so that a block
is the same bits whoever filled it. Knows nothing of what is in a block.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from refengine.cache.paged import BlockPool


@dataclass(frozen=True)
class _Entry:
    block: int
    parent: bytes
    ids: tuple[int, ...]


@dataclass
class PrefixStats:
    """Blocks found and not found at admission, tokens that need not be computed, blocks given back to the pool."""

    hits: int = 0
    misses: int = 0
    tokens_reused: int = 0
    evictions: int = 0


class PrefixCache:
    """identity: what the cached values depend on besides the ids (the model)."""

    def __init__(self, pool: BlockPool, block_size: int, identity: str) -> None:
        self._pool, self._block_size = pool, block_size
        self._root = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the least recently used first
        self.stats = PrefixStats()
        pool.reclaimer = self

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, ids: Sequence[int]) -> list[int]:
        """Blocks with the longest known beginning of `ids`, a reference to each taken; at least one id remains."""
        n_full = (len(ids) - 1) // self._block_size
        keys, blocks, parent = [], [], self._root
        for i in range(n_full):
            part = tuple(ids[i * self._block_size : (i + 1) * self._block_size])
            key = self._key(parent, part)
            entry = self._entries.get(key)
            if entry is None or entry.ids != part or entry.parent != parent:
                break
            self._pool.retain(entry.block)
            keys.append(key)
            blocks.append(entry.block)
            parent = key
        self._touch(keys)
        self.stats.hits += len(blocks)
        self.stats.misses += n_full - len(blocks)
        self.stats.tokens_reused += len(blocks) * self._block_size
        return blocks

    def unmatch(self, blocks: Sequence[int], n_ids: int) -> None:
        """Take back a `match` that came to nothing: its references, and its figures."""
        for block in blocks:
            self._pool.release(block)
        self.stats.hits -= len(blocks)
        self.stats.misses -= (n_ids - 1) // self._block_size - len(blocks)
        self.stats.tokens_reused -= len(blocks) * self._block_size

    def register(self, ids: Sequence[int], block_table: Sequence[int], keys: list[bytes]) -> None:
        """Keep the full blocks that hold `ids`. keys: of those registered before; the new ones are appended."""
        before = len(keys)
        for i in range(before, len(ids) // self._block_size):
            part = tuple(ids[i * self._block_size : (i + 1) * self._block_size])
            parent = keys[-1] if keys else self._root
            key = self._key(parent, part)
            if key not in self._entries:  # else another sequence came first with the same: its block serves
                self._pool.keep(block_table[i])
                self._entries[key] = _Entry(block_table[i], parent, part)
            keys.append(key)
        if len(keys) > before:
            self._touch(keys)

    def reclaim(self, n: int) -> None:
        """Give up to n blocks back to the pool, the least recently used first."""
        unused = (key for key, entry in self._entries.items() if self._pool.references(entry.block) == 1)
        for key in list(islice(unused, n)):
            self._pool.give_up(self._entries.pop(key).block)
            self.stats.evictions += 1

    def clear(self) -> None:
        """Forget everything."""
        for entry in self._entries.values():
            self._pool.give_up(entry.block)
        self._entries.clear()

    def _touch(self, keys: Sequence[bytes]) -> None:
        """A block is of use only with those before it: they are the more recent."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    @staticmethod
    def _key(parent: bytes, ids: tuple[int, ...]) -> bytes:
        return hashlib.blake2b(parent + np.asarray(ids, np.int64).tobytes(), digest_size=16).digest()
