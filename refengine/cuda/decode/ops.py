"""Kernels of a decode step on buffers that stay where they are: what `decode_models` is written in.

One token for each of `n` rows. Every method launches one or two kernels that write a buffer of the step; nothing is
allocated and nothing waits, so that a CUDA graph can be made of it. Each is the twin, bit for bit, of a chain of
`KernelOps` methods that its docstring names. Rows whose position is below zero are not there: they write nothing to the
cache, and what their other rows hold is of no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refengine.cuda.decode.buffers import QKV, Experts, Rows, StepBuffers, n_groups
from refengine.cuda.layout import TILE_ROWS, PackedMatrix
from refengine.cuda.ops import (
    ATTENTION_ROWS,
    BUSY,
    FEW_ROWS,
    HEAD_DIMS,
    MANY_ROWS,
    SPLIT,
    attention_shared,
    float_plane,
    is_float,
    rows8_launch,
)

Array = Any


class FusedOps(StepBuffers):
    """The operations of a step."""

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

    def qkv(self, x: Rows, w: PackedMatrix, bias: Array | None = None) -> QKV:
        """A product whose rows are Q, K and V one after another."""
        y = self.linear(x, w, self._rows("qkv", w.shape[0]), bias).reshape(-1)
        k_start, v_start = self.cfg.n_embd_q, self.cfg.n_embd_q + self.cfg.n_embd_kv
        return QKV((y, y[k_start:], y[v_start:]), (w.shape[0],) * 3)

    def q_k_v(self, x: Rows, w: Sequence[PackedMatrix], biases: Sequence[Array | None] = (None, None, None)) -> QKV:
        """Products with three matrices, Q, K and V; those of one type in one launch where rows are few."""
        n_outs = [one.shape[0] for one in w]
        n_together = 3 if w[1].type == w[2].type else 2
        if (
            is_float(w[0])
            or w[0].type != w[1].type
            or self.n > FEW_ROWS
            or n_outs[0] % TILE_ROWS
            or n_outs[1] % TILE_ROWS
        ):
            n_together = 0
        parts, strides, end = [], [], 0
        if n_together:
            width, end = sum(n_outs[:n_together]), self.n * sum(n_outs[:n_together])
            y = self._b["qkv"][:end]
            self._stacked(x, w[:n_together], biases[:n_together], y, width)
            parts, strides = [y, y[n_outs[0] :], y[n_outs[0] + n_outs[1] :]][:n_together], [width] * n_together
        for one, bias in list(zip(w, biases, strict=True))[n_together:]:
            start, end = end, end + self.n * one.shape[0]
            parts.append(self._b["qkv"][start:end])
            strides.append(one.shape[0])
            self.linear(x, one, parts[-1].reshape(self.n, -1), bias)
        return QKV((parts[0], parts[1], parts[2]), (strides[0], strides[1], strides[2]))

    def _stacked(
        self, x: Rows, w: Sequence[PackedMatrix], biases: Sequence[Array | None], y: Array, n_out: int
    ) -> None:
        """Products with two or three matrices of one type: rows of y (n, n_out) are what they give in turn."""
        kind, n_in = w[0].type.name.lower(), w[0].shape[1]
        missing = 3 - len(w)
        planes = [plane for one in w for plane in one.arguments()] + [None] * 4 * missing
        segments = -(-n_in // 256)
        blocks, warps = self._launch_of_two(kind, -(-n_out // TILE_ROWS), segments, 1)
        sizes = [np.int32(size) for size in (w[0].shape[0], w[1].shape[0], n_out, n_in, x.n)]
        arguments = [*planes, *x.prepared(), *biases, *[None] * missing, y, *sizes]
        self._launch("qkv", f"qkv_{kind}", (blocks, 1), 32 * warps, arguments, w[0].name, 1024 * segments)

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
        """As rows8_launch; of gate_up.cu's kernels, and qkv.cu's, 16 warps fit a multiprocessor, whatever the type."""
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
        qkv: QKV,
        *,
        scale: float,
        neox: bool = True,
        norms: tuple[Array | None, Array | None] = (None, None),
        q_factor: float = 1.0,
        window: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """`rms_norm` of heads, RoPE, `kv_append`, `attention`. (n, n_embd_q)"""
        cfg, kv, n = self.cfg, self.kv, self.n
        k, v = kv.k[il], kv.v[il]
        half = 0 if cfg.rope is None else cfg.rope.n_rot // 2
        q = self._rows("q", cfg.n_embd_q)
        caches = [k.values, v.values, k.exponents, v.exponents]
        sizes = [*qkv.strides, cfg.n_head, cfg.n_head_kv, cfg.head_dim, half, neox, kv.block_size, self.table_stride]
        arguments = [
            *qkv.parts,
            *norms,
            self._b.get("cos"),
            self._b.get("sin"),
            self.positions,
            self.tables,
            q,
            *caches,
        ]
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

    def route(self, x: Rows, w: PackedMatrix, bias: Array) -> tuple[Experts, Array]:
        """`top_experts`, `take_experts`, `row_soft_max` of a product + bias. Shares: (n, n_expert_used)."""
        cfg, n_pairs = self.cfg, self.n * self.cfg.n_expert_used
        scores = self.linear(x, w, self._rows("scores", cfg.n_expert), bias)
        chosen, shares = self._rows("chosen", cfg.n_expert_used), self._rows("shares", cfg.n_expert_used)
        sizes = [np.int32(cfg.n_expert), np.int32(cfg.n_expert_used)]
        self._launch("moe", "route_f32", (self.n,), 32, [scores, self.positions, chosen, shares, *sizes])
        most = n_groups(cfg, self.n)
        found = Experts(self._b["groups"][:most], self._b["x_rows"][:n_pairs], self._b["pairs"][:n_pairs])
        sizes = [np.int32(i) for i in (n_pairs, cfg.n_expert, most, FEW_ROWS, cfg.n_expert_used)]
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

    def _elements(self, kernel: str, *arrays: Array) -> None:
        n = int(arrays[0].size)
        self._launch("activation", kernel, (-(-n // 256),), 256, [*arrays, np.int64(n)])
