"""Where a decode step keeps what it computes: arrays of one arena that stay where they are, for up to `max_batch` rows.

Knows how large everything is, and how a kernel is launched on it; not what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refengine.cache.paged import KVCache
from refengine.config import ModelConfig
from refengine.cuda.memory import Layout
from refengine.cuda.ops import FEW_ROWS, SPLIT, KernelOps

Array = Any
ANGLES_AT_ONCE = 4096  # positions whose angles are made together, on the host


@dataclass(frozen=True)
class Rows:
    """n rows as products take them: floats; halves, block sums and scales of activations.cu. None: not made."""

    n: int
    floats: Array | None
    halves: Array | None
    sums: Array | None
    scale: Array | None

    def prepared(self) -> list[Array | None]:
        return [self.halves, self.sums, self.scale]


@dataclass(frozen=True)
class QKV:
    """Where Q, K and V of the first row begin, and how many floats further on those of the next."""

    parts: tuple[Array, Array, Array]
    strides: tuple[int, int, int]


@dataclass(frozen=True)
class Experts:
    """Which rows go to which experts: see group_experts in moe.cu. pairs: of a row and a rank."""

    groups: Array
    x_rows: Array
    pairs: Array


def n_groups(cfg: ModelConfig, n: int) -> int:
    """The most groups of up to FEW_ROWS pairs of one expert that n rows come to."""
    pairs = n * cfg.n_expert_used
    return min(pairs, cfg.n_expert) + pairs // FEW_ROWS


def layout_for(cfg: ModelConfig, n: int, n_positions: int, block_size: int) -> Layout:
    """The arrays of a step of n rows at positions below n_positions."""
    layout = Layout()
    want = layout.want
    n_qkv, n_used = cfg.n_embd_q + 2 * cfg.n_embd_kv, max(cfg.n_expert_used, 1)
    n_ff = cfg.n_ff_exp if cfg.n_expert else cfg.n_ff
    if cfg.rope is not None:
        for name in ("cos", "sin"):
            want(name, n_positions, cfg.rope.n_rot // 2)
    want("ids", n, dtype=np.int32)
    want("positions", n, dtype=np.int32)
    want("tables", n, -(-n_positions // block_size), dtype=np.int32)
    for name in ("x", "ffn_inp", "floats"):
        want(name, n * cfg.n_embd)
    want("qkv", n * n_qkv)
    for name in ("q", "heads"):
        want(name, n * cfg.n_embd_q)
    want("partial", n, cfg.n_head, -(-n_positions // SPLIT), cfg.head_dim + 2)
    for name in ("gate", "up", "activated"):
        want(name, n * n_used * n_ff)
    widest = n * max(cfg.n_embd, cfg.n_embd_q, n_used * n_ff)
    want("halves", widest, dtype=np.float16)
    want("sums", -(-widest // 32), dtype=np.uint32)
    want("scale", n * n_used)
    if cfg.n_expert:
        want("scores", n * cfg.n_expert)
        want("shares", n * n_used)
        want("down", n * n_used * cfg.n_embd)
        for name in ("chosen", "x_rows", "pairs"):
            want(name, n * n_used, dtype=np.int32)
        want("groups", n_groups(cfg, n), 3, dtype=np.int32)
    want("logits", n * cfg.n_vocab)
    return layout


class StepBuffers:
    """`n` rows at a time, of up to `max_batch`."""

    def __init__(self, ops: KernelOps, cfg: ModelConfig, kv: KVCache, max_batch: int, factors: Array | None) -> None:
        """factors: of RoPE's frequencies, as the model file takes them."""
        self.ops, self.cfg, self.kv, self.n = ops, cfg, kv, max_batch
        self.n_positions = min(kv.n_ctx, len(kv.k[0].values) * kv.block_size)
        self.most_splits = -(-self.n_positions // SPLIT)
        self.table_stride = -(-self.n_positions // kv.block_size)
        layout = layout_for(cfg, max_batch, self.n_positions, kv.block_size)
        self._arena = ops.memory.arena("workspace", layout.n_bytes)  # kept: what has no owner is not accounted for
        self._b = layout.taken(self._arena)
        self.ids, self.positions, self.tables = (self._b[name] for name in ("ids", "positions", "tables"))
        if cfg.rope is not None:
            for start in range(0, self.n_positions, ANGLES_AT_ONCE):
                positions = np.arange(start, min(start + ANGLES_AT_ONCE, self.n_positions))
                cos, sin = ops.rope_angles(positions, cfg.rope, factors)
                self._b["cos"][start : start + len(positions)] = cos[:, 0]
                self._b["sin"][start : start + len(positions)] = sin[:, 0]

    def _rows(self, name: str, width: int, n: int | None = None) -> Array:
        """A buffer as (n, width)."""
        n = self.n if n is None else n
        return self._b[name][: n * width].reshape(n, width)

    def _halves(self, n: int, width: int, floats: Array | None) -> Rows:
        halves, sums = self._rows("halves", width, n), self._rows("sums", width // 32, n)
        return Rows(n, floats, halves, sums, self._b["scale"][:n])

    def _eps(self) -> np.float32:
        return np.float32(self.cfg.norm_eps)

    def _launch(
        self,
        file: str,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[Any],
        what: str = "",
        shared: int = 0,
        overlap: bool = True,
    ) -> None:
        self.ops.kernels.launch(file, kernel, grid, threads, arguments, shared, overlap, what=what)
