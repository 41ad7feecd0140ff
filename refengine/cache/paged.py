"""Paged KV cache: fixed-size blocks, a block table per sequence, a free list, reference counts.

A block holds `block_size` consecutive positions of one sequence, in every layer. Sequences own blocks
by reference count, so that a common prefix can be shared. Admission is arithmetic: a batch that does not fit is
refused before anything changes.

Knows nothing of attention arithmetic: it hands out arrays and indices.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from refengine.errors import RequestError

BLOCK_SIZE = 64  # positions a block


class OutOfBlocks(RequestError):
    """The cache has too few free blocks for what was asked."""


class Reclaimer(Protocol):
    """Who holds blocks only for as long as nobody needs them: a prefix cache."""

    def reclaim(self, n: int) -> None: ...


class BlockPool:
    """Free list and reference counts of `n_blocks` blocks. Lowest free block first, so that runs are reproducible.

    reclaimer: asked for blocks when the free list is too short; its own are those it takes with `keep`.
    n_reclaimable: kept blocks that nobody else refers to.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.reclaimer: Reclaimer | None = None
        self._free = list(range(n_blocks))  # a heap
        self._references = [0] * n_blocks
        self._kept: set[int] = set()
        self.n_reclaimable = 0

    def can_allocate(self, n: int) -> bool:
        """Whether `allocate(n)` would succeed."""
        return n <= len(self._free) + self.n_reclaimable

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        """Blocks that sequences refer to."""
        return self.n_blocks - self.n_free - self.n_reclaimable

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks with one reference each, or raise `OutOfBlocks` and take none."""
        if self.reclaimer is not None and len(self._free) < n and self.can_allocate(n):
            self.reclaimer.reclaim(n - len(self._free))
        if n > len(self._free):
            raise OutOfBlocks(f"KV cache is full: {n} blocks wanted, {len(self._free)} of {self.n_blocks} free")
        blocks = [heapq.heappop(self._free) for _ in range(n)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, block: int) -> None:
        """Add a reference to a block in use."""
        assert self._references[block] > 0, f"block {block} is free"
        self.n_reclaimable -= self._only_kept(block)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; the last one frees the block."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] -= 1
        self.n_reclaimable += self._only_kept(block)
        if self._references[block] == 0:
            heapq.heappush(self._free, block)

    def keep(self, block: int) -> None:
        """As `retain`, for the reclaimer."""
        self.retain(block)
        self._kept.add(block)

    def give_up(self, block: int) -> None:
        """As `release`, of what was kept."""
        self.n_reclaimable -= self._only_kept(block)
        self._kept.remove(block)
        self.release(block)

    def _only_kept(self, block: int) -> bool:
        return self._references[block] == 1 and block in self._kept


@dataclass
class CacheSequence:
    """One sequence's place in the cache: `length` positions are filled, in the blocks of `block_table`, in order."""

    block_table: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a batch belong to one sequence, which then holds `n_kv` positions."""

    start: int
    stop: int
    n_kv: int
    block_table: np.ndarray  # (ceil(n_kv / block_size),) int64


@dataclass(frozen=True)
class Batch:
    """Tokens of one or more sequences that go through the model together.

    ids, positions, slots: (n_tokens,) int64; a slot is block * block_size + offset, the row of the flat cache.
    rows: (n_out,) int64, the tokens whose logits are wanted.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    spans: tuple[Span, ...]
    rows: np.ndarray


class KVCache:
    """K and V of all layers: for each an array (n_blocks, block_size, n_head_kv, head_dim), as the ops keep it."""

    def __init__(
        self,
        arrays: Callable[[int, tuple[int, ...]], list[Any]],
        n_layer: int,
        n_head_kv: int,
        head_dim: int,
        *,
        n_ctx: int,
        n_blocks: int,
        block_size: int = BLOCK_SIZE,
        copy_block: Callable[[Any, int, int], None] | None = None,
    ) -> None:
        """arrays: `Ops.kv_arrays`: how many, and the shape of each. copy_block: `Ops.kv_copy`, for forked sequences."""
        self._copy_block = copy_block
        self.n_ctx = n_ctx  # longest sequence it is meant for, in tokens
        self.block_size, self.n_blocks = block_size, n_blocks
        made = arrays(2 * n_layer, (n_blocks, block_size, n_head_kv, head_dim))
        self.k, self.v = made[:n_layer], made[n_layer:]
        self.pool = BlockPool(n_blocks)  # after the arrays: what does not fit fails before it costs anything

    @staticmethod
    def blocks_for(n_positions: int, block_size: int = BLOCK_SIZE) -> int:
        return -(-n_positions // block_size)

    @property
    def n_bytes(self) -> int:
        return sum(a.nbytes for a in (*self.k, *self.v))

    def blocks_needed(self, sequence: CacheSequence, n_positions: int) -> int:
        """Blocks that a sequence lacks to hold `n_positions`: new ones, and one for a shared block it would write."""
        missing = self.blocks_for(n_positions, self.block_size) - len(sequence.block_table)
        return max(missing, 0) + (self._shared(sequence) and n_positions > sequence.length)

    def reserve(self, wanted: Sequence[tuple[CacheSequence, int]]) -> None:
        """Blocks for sequences to hold so many positions each; what a fork shares and will write is copied.

        Raises `OutOfBlocks`, with nothing changed, when they do not fit.
        """
        blocks = self.pool.allocate(sum(self.blocks_needed(sequence, n) for sequence, n in wanted))
        for sequence, n_positions in wanted:
            if self._shared(sequence) and n_positions > sequence.length:
                self._own_block(sequence, sequence.length // self.block_size, blocks.pop(0))
            n = self.blocks_needed(sequence, n_positions)
            sequence.block_table += [blocks.pop(0) for _ in range(n)]
        for block in blocks:  # of two forks in one batch, the second keeps what the first no longer shares
            self.pool.release(block)

    def fork(self, sequence: CacheSequence) -> CacheSequence:
        """Another sequence with the same positions, in the same blocks until one of the two writes there."""
        table = sequence.block_table[: self.blocks_for(sequence.length, self.block_size)]
        for block in table:
            self.pool.retain(block)
        return CacheSequence(table, sequence.length)

    def _shared(self, sequence: CacheSequence) -> bool:
        """Whether the block that the next position falls into is partly filled and others refer to it."""
        if sequence.length % self.block_size == 0:
            return False
        return self.pool.references(sequence.block_table[sequence.length // self.block_size]) > 1

    def _own_block(self, sequence: CacheSequence, i: int, block: int) -> None:
        """Copy on write: put a copy of block i of a sequence in its place."""
        assert self._copy_block is not None, "this cache was made without copy_block"
        for array in (*self.k, *self.v):
            self._copy_block(array, sequence.block_table[i], block)
        self.pool.release(sequence.block_table[i])
        sequence.block_table[i] = block

    def batch(self, parts: Sequence[tuple[CacheSequence, Sequence[int]]], rows: Sequence[int] | None = None) -> Batch:
        """Reserve blocks for new tokens of sequences and describe them as one batch.

        parts: sequences with the ids to append to each. rows: batch rows whose logits are wanted (default: all).
        `commit` makes the new positions part of the sequences once the forward pass has filled them.
        Raises `OutOfBlocks`, with nothing reserved, when they do not fit.
        """
        self.reserve([(s, s.length + len(ids)) for s, ids in parts])
        positions, slots, spans, start = [], [], [], 0
        for sequence, ids in parts:
            table = np.asarray(sequence.block_table, dtype=np.int64)
            n_kv = sequence.length + len(ids)
            position = np.arange(sequence.length, n_kv)
            positions.append(position)
            slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
            spans.append(Span(start, start + len(ids), n_kv, table[: self.blocks_for(n_kv, self.block_size)]))
            start += len(ids)
        return Batch(
            ids=np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids in parts]),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            spans=tuple(spans),
            rows=np.arange(start) if rows is None else np.asarray(rows, dtype=np.int64),
        )

    def commit(self, parts: Sequence[tuple[CacheSequence, Sequence[int]]]) -> None:
        """The forward pass of `batch(parts)` is done: its positions now belong to the sequences."""
        for sequence, ids in parts:
            sequence.length += len(ids)

    def free(self, sequence: CacheSequence) -> None:
        """Give the sequence's blocks back. Freeing twice is harmless."""
        for block in sequence.block_table:
            self.pool.release(block)
        sequence.block_table.clear()
        sequence.length = 0
