"""Kernels of a decode step on buffers that stay where they are: what `decode_models` is written in.

One token for each of `n` rows. Every method launches one or two kernels that write a buffer of the step; nothing is
allocated and nothing waits, so that a CUDA graph can be made of it. Each is the twin, bit for bit, of a chain of
`KernelOps` methods that its docstring names. Rows whose position is below zero are not there: they write nothing to the
cache, and what their other rows hold is of no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from refengine.config import ModelConfig
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.memory import Layout
from refengine.cuda.ops import (
    ATTENTION_ROWS,
    BUSY,
    FEW_ROWS,
    HEAD_DIMS,
    MANY_ROWS,
    SPLIT,
    KernelOps,
    attention_shared,
    float_plane,
    is_float,
    rows8_launch,
)
from refengine.kv_cache import KVCache

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
class Experts:
    """Which rows go to which experts: see group_experts in moe.cu. pairs: of a row and a rank."""

    groups: Array
    x_rows: Array
    pairs: Array


class FusedOps:
    """The operations of a step of up to `max_batch` rows; `n` of them at a time ."""

    def __init__(self, ops: KernelOps, cfg: ModelConfig, kv: KVCache, max_batch: int, factors: Array | None) -> None:
        """factors: of RoPE's frequencies, as the model file takes them."""
        self.ops, self.cfg, self.kv, self.n = ops, cfg, kv, max_batch
        self.n_positions = min(kv.n_ctx, len(kv.k[0].values) * kv.block_size)
        self.most_splits = -(-self.n_positions // SPLIT)
        self.table_stride = -(-self.n_positions // kv.block_size)
        self._arena_of(max_batch)
        if cfg.rope is not None:
            for start in range(0, self.n_positions, ANGLES_AT_ONCE):
                positions = np.arange(start, min(start + ANGLES_AT_ONCE, self.n_positions))
                cos, sin = ops.rope_angles(positions, cfg.rope, factors)
                self._b["cos"][start : start + len(positions)] = cos[:, 0]
                self._b["sin"][start : start + len(positions)] = sin[:, 0]

    def _arena_of(self, n: int) -> None:
        cfg, want = self.cfg, (layout := Layout()).want
        n_qkv, n_used = cfg.n_embd_q + 2 * cfg.n_embd_kv, max(cfg.n_expert_used, 1)
        n_ff = cfg.n_ff_exp if cfg.n_expert else cfg.n_ff
        if cfg.rope is not None:
            for name in ("cos", "sin"):
                want(name, self.n_positions, cfg.rope.n_rot // 2)
        want("ids", n, dtype=np.int32)
        want("positions", n, dtype=np.int32)
        want("tables", n, self.table_stride, dtype=np.int32)
        for name in ("x", "ffn_inp", "floats"):
            want(name, n * cfg.n_embd)
        want("qkv", n * n_qkv)
        for name in ("q", "heads"):
            want(name, n * cfg.n_embd_q)
        want("partial", n, cfg.n_head, self.most_splits, cfg.head_dim + 2)
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
            want("groups", self._n_groups(n), 3, dtype=np.int32)
        want("logits", n * cfg.n_vocab)
        self._b = layout.taken(self.ops.memory.arena("workspace", layout.n_bytes))
        self.ids, self.positions, self.tables = (self._b[name] for name in ("ids", "positions", "tables"))

    def _rows(self, name: str, width: int, n: int | None = None) -> Array:
        """A buffer as (n, width)."""
        n = self.n if n is None else n
        return self._b[name][: n * width].reshape(n, width)

    # --- Into the layers, norms ---

    def embedding(self, w: PackedMatrix, position_embd: PackedMatrix | None = None) -> Array:
        """Rows of the ids; plus those of the positions. `embedding`, +. (n, n_embd)"""
        if position_embd is None:
            return self._embedding(w, self.ids, "x")
        embd = self._embedding(w, self.ids, "ffn_inp")
        pos_embd = self._embedding(position_embd, self.positions, "floats")
        x = self._rows("x", self.cfg.n_embd)
        self._elements("add_f32", embd, pos_embd, x)
        return x

    def _embedding(self, w: PackedMatrix, ids: Array, to: str) -> Array:
        n_in = self.cfg.n_embd
        out = self._rows(to, n_in)
        kernel = f"embedding_{w.type.name.lower()}"
        if is_float(w):
            arguments, n_blocks, threads = [float_plane(w)], 1, 128
        else:
            arguments, n_blocks, threads = w.arguments(), -(-n_in // 256), 32
        arguments += [ids, out, np.int32(n_in)]
        self._launch("embedding", kernel, (self.n, n_blocks), threads, arguments, w.name, overlap=False)
        return out

    def rms_norm(self, x: Array, weight: Array, into: Sequence[PackedMatrix]) -> Rows:
        """`rms_norm`, and what products with the matrices `into` need of it."""
        return self._norm("rms_norm_f16", x, [weight], into)

    def layer_norm(self, x: Array, weight: Array, bias: Array, into: Sequence[PackedMatrix]) -> Rows:
        """`layer_norm`, and what products with the matrices `into` need of it."""
        return self._norm("layer_norm_f16", x, [weight, bias], into)

    def _norm(self, kernel: str, x: Array, vectors: list[Array], into: Sequence[PackedMatrix]) -> Rows:
        n = self.cfg.n_embd
        floats = self._rows("floats", n) if any(map(is_float, into)) else None
        rows = Rows(self.n, floats, None, None, None)
        if not all(map(is_float, into)):
            rows = self._halves(self.n, n, floats)
        out = [floats, rows.halves, rows.scale, rows.sums]
        self._launch("fused", kernel, (self.n,), 256, [x, *vectors, *out, np.int32(n), self._eps()], shared=4 * n)
        return rows

    def _halves(self, n: int, width: int, floats: Array | None) -> Rows:
        halves, sums = self._rows("halves", width, n), self._rows("sums", width // 32, n)
        return Rows(n, floats, halves, sums, self._b["scale"][:n])

    def _given(self, x: Array, w: PackedMatrix) -> Rows:
        """Rows of floats for a product with w."""
        n, width = x.shape
        if is_float(w):
            return Rows(n, x, None, None, None)
        rows = self._halves(n, width, None)
        threads = min(1024, max(64, width // 8 // 32 * 32))
        arguments = [x, rows.halves, rows.scale, rows.sums, np.int32(width)]
        self._launch("activations", "activations_f16", (n,), threads, arguments)
        return rows

    # --- Products ---

    def linear(
        self,
        x: Rows | Array,
        w: PackedMatrix,
        y: Array,
        bias: Array | None = None,
        residual: Array | None = None,
        experts: Experts | None = None,
    ) -> Array:
        """`linear`, + bias, + residual; with experts, `linear_experts`. x: prepared, or floats (n, n_in)."""
        given = x if isinstance(x, Rows) else self._given(x, w)
        n_out, n_in = w.shape[-2:]
        kind, few = w.type.name.lower(), experts is not None or given.n <= FEW_ROWS
        n_groups = len(experts.groups) if experts else -(-given.n // (FEW_ROWS if few or is_float(w) else MANY_ROWS))
        slots = [experts.groups, experts.x_rows, experts.pairs] if experts else [None, None, None]
        sizes = [np.int32(n_out), np.int32(n_in), np.int32(given.n)]
        rest = [*slots, bias, residual, y, *sizes]
        if is_float(w):
            grid = (-(-n_out // 8), n_groups)
            self._launch("matmul_f32", f"rows8_{kind}", grid, 256, [float_plane(w), given.floats, *rest], w.name)
            return y
        arguments = [*w.arguments(), *given.prepared(), *rest]
        tiles, segments = -(-n_out // 16), -(-n_in // 256)
        if few:
            blocks, warps = rows8_launch(kind, tiles, segments, n_groups, self.ops.kernels.n_multiprocessors)
            shared = 1024 * segments
            self._launch("matmul", f"rows8_{kind}", (blocks, n_groups), 32 * warps, arguments, w.name, shared)
        else:
            grid = (-(-tiles // 4), n_groups)
            self._launch("matmul", f"rows64_{kind}", grid, 128, arguments, w.name, overlap=False)
        return y

    def qkv(self, x: Rows, w: PackedMatrix, bias: Array | None = None) -> tuple[Array, Array, Array]:
        """A product whose rows are Q, K and V one after another, and where each of them begins in it."""
        y = self.linear(x, w, self._rows("qkv", w.shape[0]), bias).reshape(-1)
        return y, y[self.cfg.n_embd_q :], y[self.cfg.n_embd_q + self.cfg.n_embd_kv :]

    def q_k_v(
        self, x: Rows, w: Sequence[PackedMatrix], biases: Sequence[Array | None] = (None, None, None)
    ) -> tuple[Array, Array, Array]:
        """Products with three matrices, Q, K and V."""
        ends = np.cumsum([0, *(self.n * one.shape[0] for one in w)])
        parts = [self._b["qkv"][start:end] for start, end in pairwise(ends)]
        for part, one, bias in zip(parts, w, biases, strict=True):
            self.linear(x, one, part.reshape(self.n, -1), bias)
        return parts[0], parts[1], parts[2]

    def swiglu(self, x: Rows, gate: PackedMatrix, up: PackedMatrix) -> Array:
        """`swiglu` of two products. (n, n_ff)"""
        return self._gate_up(x, gate, up, (None, None), None, "swiglu_f32")

    def swiglu_clamped(
        self, x: Rows, gate: PackedMatrix, up: PackedMatrix, biases: tuple[Array, Array], experts: Experts
    ) -> Array:
        """`swiglu_clamped` of two products of experts, + biases. (n * n_expert_used, n_ff_exp)"""
        return self._gate_up(x, gate, up, biases, experts, "swiglu_clamped_f32")

    def _gate_up(
        self,
        x: Rows,
        gate: PackedMatrix,
        up: PackedMatrix,
        biases: tuple[Array | None, Array | None],
        experts: Experts | None,
        activation: str,
    ) -> Array:
        n_out, n_in = gate.shape[-2:]
        n_rows = len(experts.pairs) if experts else self.n
        y = self._rows("activated", n_out, n_rows)
        kind = gate.type.name.lower()
        if gate.type != up.type or is_float(gate) or not (experts or x.n <= FEW_ROWS):
            to = [self._rows(name, n_out, n_rows) for name in ("gate", "up")]
            for w, bias, part in zip((gate, up), biases, to, strict=True):
                self.linear(x, w, part, bias, experts=experts)
            self._elements(activation, *to, y)
            return y
        slots = [experts.groups, experts.x_rows, experts.pairs] if experts else [None, None, None]
        n_groups = len(experts.groups) if experts else 1
        segments = -(-n_in // 256)
        blocks, warps = self._launch_of_two(kind, -(-n_out // 16), 2 * segments, n_groups)
        sizes = [np.int32(n) for n in (n_out, n_in, n_rows, activation == "swiglu_clamped_f32")]
        arguments = [*gate.arguments(), *up.arguments(), *x.prepared(), *slots, *biases, y, *sizes]
        grid, shared = (blocks, n_groups), 2048 * segments
        self._launch("gate_up", f"gate_up_{kind}", grid, 32 * warps, arguments, gate.name, shared)
        return y

    def gelu(self, x: Rows, up: PackedMatrix, bias: Array) -> Array:
        """`gelu` of a product + bias. (n, n_ff)"""
        n_out, n_in = up.shape
        y = self._rows("activated", n_out)
        if is_float(up) or x.n > FEW_ROWS:
            self._elements("gelu_f32", self.linear(x, up, self._rows("up", n_out), bias), y)
            return y
        kind, segments = up.type.name.lower(), -(-n_in // 256)
        blocks, warps = self._launch_of_two(kind, -(-n_out // 16), segments, 1)
        sizes = [np.int32(n) for n in (n_out, n_in, x.n)]
        arguments = [*up.arguments(), *x.prepared(), bias, y, *sizes]
        self._launch("gate_up", f"up_gelu_{kind}", (blocks, 1), 32 * warps, arguments, up.name, 1024 * segments)
        return y

    def _launch_of_two(self, kind: str, tiles: int, items: int, n_groups: int) -> tuple[int, int]:
        """As rows8_launch; of gate_up.cu's kernels no more than 16 warps fit a multiprocessor, whatever the type."""
        as_narrow = kind if kind == "f16" else "q4_0"
        return rows8_launch(as_narrow, tiles, items, n_groups, self.ops.kernels.n_multiprocessors)

    def down(self, x: Array, w: PackedMatrix, ffn_inp: Array, bias: Array | None = None) -> Array:
        """The layer's last product + what it began with: l_out (n, n_embd)."""
        return self.linear(x, w, self._rows("x", self.cfg.n_embd), bias, ffn_inp)

    def logits(self, x: Rows, w: PackedMatrix) -> Array:
        return self.linear(x, w, self.logits_of(self.n))

    def logits_of(self, n: int) -> Array:
        """Those of the last step. (n, n_vocab)"""
        return self._rows("logits", self.cfg.n_vocab, n)

    # --- Attention ---

    def attention(
        self,
        il: int,
        qkv: tuple[Array, Array, Array],
        *,
        scale: float,
        neox: bool = True,
        norms: tuple[Array | None, Array | None] = (None, None),
        q_factor: float = 1.0,
        fused: bool = False,
        window: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """`rms_norm` of heads, RoPE, `kv_append`, `attention`. fused: Q, K, V are parts of one row. (n, n_embd_q)"""
        cfg, kv, n = self.cfg, self.kv, self.n
        k, v = kv.k[il], kv.v[il]
        half = 0 if cfg.rope is None else cfg.rope.n_rot // 2
        n_qkv = cfg.n_embd_q + 2 * cfg.n_embd_kv
        strides = [n_qkv, n_qkv] if fused else [cfg.n_embd_q, cfg.n_embd_kv]
        q = self._rows("q", cfg.n_embd_q)
        caches = [k.values, v.values, k.exponents, v.exponents]
        sizes = [*strides, cfg.n_head, cfg.n_head_kv, cfg.head_dim, half, neox, kv.block_size, self.table_stride]
        arguments = [*qkv, *norms, self._b.get("cos"), self._b.get("sin"), self.positions, self.tables, q, *caches]
        arguments += [*map(np.int32, sizes), self._eps(), np.float32(q_factor)]
        self._launch("fused", "rope_append", (n, cfg.n_head + 2 * cfg.n_head_kv), 32, arguments)

        tiles = -(-cfg.n_head // cfg.n_head_kv // ATTENTION_ROWS) * n
        at_once = min(self._splits_seen(window), max(1, -(-BUSY // (tiles * cfg.n_head_kv))))
        width = next(d for d in HEAD_DIMS if d >= cfg.head_dim)
        partial, heads = self._b["partial"], self._rows("heads", cfg.n_embd_q)
        sizes = [cfg.n_head, cfg.n_head_kv, cfg.head_dim, kv.block_size, window]
        arguments = [q, *caches, self.tables, self.positions, partial, *map(np.int32, sizes), np.float32(scale)]
        arguments += [np.int32(self.table_stride), np.int32(self.most_splits)]
        grid = (tiles, cfg.n_head_kv, at_once)
        self._launch("attention", f"attention_step_{width}", grid, 256, arguments, shared=attention_shared(width))
        sizes = [cfg.n_head, cfg.head_dim, window, self.most_splits]
        arguments = [partial, sinks, self.positions, heads, *map(np.int32, sizes)]
        self._launch("attention", "attention_step_merge", (n, cfg.n_head), cfg.head_dim, arguments)
        return heads

    def _splits_seen(self, window: int) -> int:
        """The most splits in which a row has visible positions."""
        return min(self.most_splits, -(-window // SPLIT) + 1) if window else self.most_splits

    def projection(self, heads: Array, w: PackedMatrix, x: Array, bias: Array | None = None) -> Array:
        """`linear` of attention's heads, + bias, + what the layer began with: ffn_inp (n, n_embd)."""
        return self.linear(heads, w, self._rows("ffn_inp", self.cfg.n_embd), bias, x)

    # --- Experts ---

    def _n_groups(self, n: int) -> int:
        pairs = n * self.cfg.n_expert_used
        return min(pairs, self.cfg.n_expert) + pairs // FEW_ROWS

    def route(self, x: Rows, w: PackedMatrix, bias: Array) -> tuple[Experts, Array]:
        """`top_experts`, `take_experts`, `row_soft_max` of a product + bias. Shares: (n, n_expert_used)."""
        cfg, n_pairs = self.cfg, self.n * self.cfg.n_expert_used
        scores = self.linear(x, w, self._rows("scores", cfg.n_expert), bias)
        chosen, shares = self._rows("chosen", cfg.n_expert_used), self._rows("shares", cfg.n_expert_used)
        sizes = [np.int32(cfg.n_expert), np.int32(cfg.n_expert_used)]
        self._launch("moe", "route_f32", (self.n,), 32, [scores, self.positions, chosen, shares, *sizes])
        n_groups = self._n_groups(self.n)
        found = Experts(self._b["groups"][:n_groups], self._b["x_rows"][:n_pairs], self._b["pairs"][:n_pairs])
        sizes = [np.int32(i) for i in (n_pairs, cfg.n_expert, n_groups, FEW_ROWS, cfg.n_expert_used)]
        arguments = [chosen, found.groups, found.x_rows, found.pairs, *sizes]
        self._launch("moe", "group_experts", (1,), 256, arguments, shared=8 * cfg.n_expert)
        return found, shares

    def down_experts(
        self, x: Array, w: PackedMatrix, bias: Array, experts: Experts, shares: Array, ffn_inp: Array
    ) -> Array:
        """`linear_experts` + bias, times shares, `sum_experts`, + what the half layer began with: l_out (n, n_embd)."""
        n_embd, n_used = self.cfg.n_embd, self.cfg.n_expert_used
        by_pair = Experts(experts.groups, experts.pairs, experts.pairs)
        down = self.linear(x, w, self._rows("down", n_embd, len(x)), bias, experts=by_pair)
        y = self._rows("x", n_embd)
        arguments = [down, shares, ffn_inp, y, np.int32(n_used), np.int32(n_embd)]
        self._launch("moe", "combine_f32", (-(-n_embd // 256), self.n), 256, arguments)
        return y

    # --- Launching ---

    def _eps(self) -> np.float32:
        return np.float32(self.cfg.norm_eps)

    def _elements(self, kernel: str, *arrays: Array) -> None:
        n = int(arrays[0].size)
        self._launch("activation", kernel, (-(-n // 256),), 256, [*arrays, np.int64(n)])

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
