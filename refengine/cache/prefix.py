"""The prefix cache keeps full KV cache blocks and reuses them for later prompts with the same beginning.

The key of a full block is a chained hash of the model's identity and all token ids up to the block's end; a hit is
verified by comparing the ids. Sequences share blocks by reference; the cache holds one reference to each block, and
gives the least recently used blocks back when the pool runs short. The order of additions in the kernels depends on
positions only, so a block has the same bits whichever sequence has filled it. Independent of the contents of blocks.
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
    """Counters: blocks found and not found at admission, tokens that were reused, blocks given back to the pool."""

    hits: int = 0
    misses: int = 0
    tokens_reused: int = 0
    evictions: int = 0


class PrefixCache:
    """The prefix cache of one block pool. identity: what the values depend on besides the ids (the model)."""

    def __init__(self, pool: BlockPool, block_size: int, identity: str) -> None:
        self._pool, self._block_size = pool, block_size
        self._root = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the least recently used first
        self.stats = PrefixStats()
        pool.reclaimer = self

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, ids: Sequence[int]) -> list[int]:
        """The blocks of the longest cached beginning of `ids`, with a new reference to each; never all ids."""
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
        """Undo a `match` whose blocks are not used: its references and its counts."""
        for block in blocks:
            self._pool.release(block)
        self.stats.hits -= len(blocks)
        self.stats.misses -= (n_ids - 1) // self._block_size - len(blocks)
        self.stats.tokens_reused -= len(blocks) * self._block_size

    def register(self, ids: Sequence[int], block_table: Sequence[int], keys: list[bytes]) -> None:
        """Keep the full blocks that hold `ids`. keys: the keys of blocks registered before; new keys are appended."""
        before = len(keys)
        for i in range(before, len(ids) // self._block_size):
            part = tuple(ids[i * self._block_size : (i + 1) * self._block_size])
            parent = keys[-1] if keys else self._root
            key = self._key(parent, part)
            if key not in self._entries:  # otherwise an equal block of another sequence is kept already
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
        """Mark blocks as recently used, earlier blocks last: a block is only useful together with those before it."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    @staticmethod
    def _key(parent: bytes, ids: tuple[int, ...]) -> bytes:
        return hashlib.blake2b(parent + np.asarray(ids, np.int64).tobytes(), digest_size=16).digest()
