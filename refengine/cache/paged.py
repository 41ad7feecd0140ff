"""Paged KV cache: fixed-size blocks, a block table per sequence, a free list, reference counts.

A block holds `block_size` consecutive positions of one sequence, in every layer. Blocks have reference counts, so that
sequences can share a common prefix. A batch that does not fit is refused before anything changes.

Independent of attention arithmetic: this module only provides arrays and indices.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from refengine.errors import RequestError

BLOCK_SIZE = 64  # positions per block


class OutOfBlocks(RequestError):
    """The cache has fewer free blocks than requested."""


class Reclaimer(Protocol):
    """Keeps blocks only while they are not needed elsewhere, like the prefix cache."""

    def reclaim(self, n: int) -> None:
        """Give up to `n` blocks back to the pool."""


class BlockPool:
    """The free list and reference counts of `n_blocks` blocks. Allocates the lowest free block first (reproducible).

    reclaimer: is asked to give blocks back when the free list is too short; it has taken them with `keep`.
    n_reclaimable: the number of kept blocks without any other reference.
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
        """The number of blocks that sequences use."""
        return self.n_blocks - self.n_free - self.n_reclaimable

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks with one reference each, or raise `OutOfBlocks` and take none."""
        if self.reclaimer is not None and len(self._free) < n and self.can_allocate(n):
            self.reclaimer.reclaim(n - len(self._free))
        if n > len(self._free):
            raise OutOfBlocks(f"KV cache is full: {n} blocks needed, {len(self._free)} of {self.n_blocks} free")
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
        """Add the reclaimer's reference to a block in use."""
        self.retain(block)
        self._kept.add(block)

    def give_up(self, block: int) -> None:
        """Drop the reclaimer's reference."""
        self.n_reclaimable -= self._only_kept(block)
        self._kept.remove(block)
        self.release(block)

    def _only_kept(self, block: int) -> bool:
        return self._references[block] == 1 and block in self._kept


@dataclass
class CacheSequence:
    """One sequence in the cache: its first `length` positions are filled; they are in the blocks of `block_table`."""

    block_table: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a batch, which belong to one sequence; after them it holds `n_kv` positions."""

    start: int
    stop: int
    n_kv: int
    block_table: np.ndarray  # (ceil(n_kv / block_size),) int64


@dataclass(frozen=True)
class Batch:
    """Tokens of one or more sequences that go through the model together.

    ids, positions, slots: (n_tokens,) int64; a slot is block * block_size + offset.
    rows: (n_out,) int64, the batch rows whose logits are needed.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    spans: tuple[Span, ...]
    rows: np.ndarray


class KVCache:
    """K and V of all layers, (n_blocks, block_size, n_head_kv, head_dim) for each; the ops choose type and order."""

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
        """arrays: `Ops.kv_arrays`, which makes this many arrays of this shape. copy_block: `Ops.kv_copy`, for forks."""
        self._copy_block = copy_block
        self.n_ctx = n_ctx  # the length of the longest sequence, in tokens
        self.block_size, self.n_blocks = block_size, n_blocks
        kv = arrays(2 * n_layer, (n_blocks, block_size, n_head_kv, head_dim))
        self.k, self.v = kv[:n_layer], kv[n_layer:]
        self.pool = BlockPool(n_blocks)  # made after the arrays, so that too large a cache fails at once

    @staticmethod
    def blocks_for(n_positions: int, block_size: int = BLOCK_SIZE) -> int:
        return -(-n_positions // block_size)

    @property
    def n_bytes(self) -> int:
        return sum(a.nbytes for a in (*self.k, *self.v))

    def blocks_needed(self, sequence: CacheSequence, n_positions: int) -> int:
        """The number of blocks a sequence lacks to hold `n_positions`, with one for a copy of a shared block."""
        missing = self.blocks_for(n_positions, self.block_size) - len(sequence.block_table)
        return max(missing, 0) + (n_positions > sequence.length and self._shared(sequence))

    def reserve(self, sequences: Sequence[tuple[CacheSequence, int]]) -> None:
        """Allocate blocks so that each sequence can hold its number of positions; copies shared blocks it writes to.

        Raises `OutOfBlocks` if they do not fit; nothing is changed then.
        """
        n_needed = sum(self.blocks_needed(sequence, n) for sequence, n in sequences)
        if not n_needed:
            return
        blocks = self.pool.allocate(n_needed)
        for sequence, n_positions in sequences:
            if self._shared(sequence) and n_positions > sequence.length:
                self._own_block(sequence, sequence.length // self.block_size, blocks.pop(0))
            n = self.blocks_needed(sequence, n_positions)
            sequence.block_table += [blocks.pop(0) for _ in range(n)]
        for block in blocks:  # of two forks in one batch, the second keeps the block that the first has copied
            self.pool.release(block)

    def fork(self, sequence: CacheSequence) -> CacheSequence:
        """A second sequence with the same positions; the two share blocks until one of them writes."""
        table = sequence.block_table[: self.blocks_for(sequence.length, self.block_size)]
        for block in table:
            self.pool.retain(block)
        return CacheSequence(table, sequence.length)

    def _shared(self, sequence: CacheSequence) -> bool:
        """Whether the block of the next position is partly filled and also used by others."""
        if sequence.length % self.block_size == 0:
            return False
        return self.pool.references(sequence.block_table[sequence.length // self.block_size]) > 1

    def _own_block(self, sequence: CacheSequence, i: int, block: int) -> None:
        """Copy on write: replace block i of a sequence by `block`, with the same content."""
        assert self._copy_block is not None, "this cache was made without copy_block"
        for array in (*self.k, *self.v):
            self._copy_block(array, sequence.block_table[i], block)
        self.pool.release(sequence.block_table[i])
        sequence.block_table[i] = block

    def batch(self, parts: Sequence[tuple[CacheSequence, Sequence[int]]], rows: Sequence[int] | None = None) -> Batch:
        """Reserve blocks for new tokens of sequences and describe them as one batch.

        parts: sequences with the ids to append to each. rows: batch rows whose logits are needed (default: all).
        `commit` adds the new positions to the sequences after the forward pass has filled them.
        Raises `OutOfBlocks` if they do not fit; nothing is reserved then.
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
        """Release the sequence's blocks. A second call does nothing."""
        for block in sequence.block_table:
            self.pool.release(block)
        sequence.block_table.clear()
        sequence.length = 0
