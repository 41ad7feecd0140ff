"""`ops.decode.DecodeOps` on kernels: fuses operations if there is a kernel for it, and uses buffers planned ahead.

A product is launched only when its value is needed. Before that, an addition can become its residual and an activation
its epilogue; a norm before it is part of it, or of the conversion of its rows; and the products for Q, K and V become
one. Attention includes the norms of heads, RoPE and the writing of the cache. Nothing is allocated and nothing waits,
so a step can be captured as a CUDA graph. Every fused kernel gives the same bits as the operations of `cuda.ops` that
it replaces. Rows whose position is below zero have no sequence: they write nothing to the cache, and their values have
no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.decode.buffers import Buffer, Buffers
from refengine.cuda.decode.values import Choice, Columns, ExpertSum, Heads, NoFusedStep, Norm, Product, Shares, Value
from refengine.cuda.kernels import activation, embedding, few_rows, matmul, moe, norm, quantize_rows, router
from refengine.cuda.kernels.attention import PagedRows, Projections, Rotation
from refengine.cuda.kernels.attention_step import attention_step, step_division
from refengine.cuda.kernels.few_rows import FEW_ROWS, Activation, can_prepare
from refengine.cuda.kernels.moe import Groups
from refengine.cuda.kernels.norm import row_squares
from refengine.cuda.kernels.quantize_rows import BLOCK, GROUP, Converted, RowNorm, Rows
from refengine.cuda.layout import TILE_ROWS, PackedMatrix, rows_of
from refengine.cuda.runtime.launch import Kernels

Angles = tuple[Array, Array]

ROWS_IN_PRODUCT = 2  # up to so many rows, products do the norm before them and the conversion, if they fit


@dataclass(frozen=True)
class StepArrays:
    """The arrays that all steps share. ids, positions: (max_batch,) int32, positions below zero for rows without a
    sequence; tables: (max_batch, n_blocks) int32, blocks of the cache; k, v: the cache of each layer.

    arrived, routed: counters of `attention_step`, which prompts do not need, and of `router.route`; zeros between
    launches. angles: gives cos and sin (n_positions, n_rot / 2) float32, by the number of the request in `decode()`.
    """

    ids: Array
    positions: Array
    tables: Array
    arrived: Array | None
    routed: Array
    k: Sequence[PagedRows]
    v: Sequence[PagedRows]
    n_ctx: int
    angles: Callable[[int, Any, Array | None], Angles]


class StepOps:
    """The operations of one step of n rows."""

    def __init__(self, kernels: Kernels, arrays: StepArrays, buffers: Buffers, n: int) -> None:
        self._kernels, self._a, self._b, self._n = kernels, arrays, buffers, n
        self._n_angles = 0

    @property
    def n_ctx(self) -> int:
        return self._a.n_ctx

    def array(self, x: Value) -> Array:
        """The rows (n_rows, width) of a value. Launches their computation if necessary."""
        (rows,) = self._arrays(x)
        return rows

    # --- Into the layers, norms, products ---

    def embedding(self, w: PackedMatrix) -> Value:
        return self._embedded(w, self._a.ids)

    def position_embedding(self, w: PackedMatrix) -> Value:
        return self._embedded(w, self._a.positions)

    def _embedded(self, w: PackedMatrix, ids: Array) -> Value:
        """The rows of ids. The launch does not overlap: a step's first kernel waits for all that was done before it."""
        y, squares = (self._new(self._n, w.shape[1]), None) if w.is_float else self._new_residual(self._n, w.shape[1])
        self._launch(embedding.embedding, w, ids[: self._n], y.array, _array(squares))
        return Value(self._n, w.shape[1], y, squares)

    def rms_norm(self, x: Any, weight: Array, eps: float) -> Any:
        if isinstance(x, Heads):
            return replace(x, norm=weight, eps=eps)
        return Norm(x.n_rows, x.width, x=x, weight=weight, eps=eps)

    def layer_norm(self, x: Value, weight: Array, bias: Array, eps: float) -> Value:
        return Norm(x.n_rows, x.width, x=x, weight=weight, bias=bias, eps=eps)

    def linear(self, x: Value, w: PackedMatrix, bias: Array | None = None) -> Value:
        return Product(x.n_rows, w.shape[0], x=x, w=w, bias=bias)

    def rows(self, x: Value) -> Value:
        return x

    def split(self, x: Value, widths: tuple[int, ...]) -> tuple[Value, ...]:
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return tuple(Columns(x.n_rows, width, of=x, start=start) for width, start in zip(widths, starts, strict=True))

    def add(self, a: Value, b: Value) -> Value:
        for first, second in ((a, b), (b, a)):
            if isinstance(first, Product) and first.buffer is None and first.choice is None:
                return Value(first.n_rows, first.width, *self._multiply(first, residual=second))
            if isinstance(first, ExpertSum):
                return self._combine(first, second)
        return self._elements(activation.add, a, b)

    # --- Activations ---

    def swiglu(self, gate: Value, up: Value) -> Value:
        return self._gated(gate, up, False)

    def swiglu_clamped(self, gate: Value, up: Value) -> Value:
        return self._gated(gate, up, True)

    def _gated(self, gate: Value, up: Value, clamped: bool) -> Value:
        gate, up = _as_product(gate), _as_product(up)
        if not (
            isinstance(gate, Product)
            and isinstance(up, Product)
            and gate.buffer is up.buffer is None
            and gate.x is up.x
            and gate.choice is up.choice
            and self._gate_up_fits(gate, up)
        ):
            return self._elements(activation.swiglu_clamped if clamped else activation.swiglu, gate, up)
        assert gate.x is not None
        assert gate.w is not None
        assert up.w is not None
        groups, of_groups = self._groups(gate, gate.x)  # first, because the router also needs the norm's floats
        rows, of_rows = self._rows(gate.x, gate.w, up.w)
        self._use(*of_rows, *of_groups)
        y = self._new(gate.n_rows, gate.width)
        matrices, biases = (gate.w, up.w), (gate.bias, up.bias)
        kind = Activation.SWIGLU_CLAMPED if clamped else Activation.SWIGLU
        self._launch(few_rows.multiply, rows, matrices, biases, y.array, activation=kind, groups=groups)
        self._note_groups(gate)
        return Value(gate.n_rows, gate.width, y)

    def _gate_up_fits(self, gate: Product, up: Product) -> bool:
        assert gate.w is not None
        assert up.w is not None
        assert gate.x is not None
        n_rows = gate.x.n_rows if gate.choice is None else self._group_size(gate)
        return few_rows.fits((gate.w, up.w), n_rows, Activation.SWIGLU)

    def gelu(self, x: Value) -> Value:
        if not (isinstance(x, Product) and x.buffer is None and x.choice is None and x.n_rows <= FEW_ROWS):
            return self._elements(activation.gelu, x)
        assert x.x is not None
        assert x.w is not None
        if x.w.is_float:
            return self._elements(activation.gelu, x)
        rows, of_rows = self._rows(x.x, x.w)
        self._use(*of_rows)
        y = self._new(x.n_rows, x.width)
        self._launch(few_rows.multiply, rows, (x.w,), (x.bias,), y.array, activation=Activation.GELU)
        return Value(x.n_rows, x.width, y)

    def _elements(self, binding: Callable[..., None], *values: Value) -> Value:
        arrays = self._arrays(*values)
        y = self._new(values[0].n_rows, values[0].width)
        self._launch(binding, *arrays, y.array, overlap=True)
        return Value(values[0].n_rows, values[0].width, y)

    # --- Attention ---

    def heads(self, x: Value, n_head: int) -> Heads:
        return Heads(x, n_head)

    def rope_angles(self, constants: Any, freq_factors: Array | None = None) -> Angles:
        self._n_angles += 1
        return self._a.angles(self._n_angles - 1, constants, freq_factors)

    def rope_norm(self, x: Heads, angles: Angles) -> Heads:
        return replace(x, rotation=Rotation(*angles, neox=False))

    def rope_neox(self, x: Heads, angles: Angles) -> Heads:
        return replace(x, rotation=Rotation(*angles, neox=True))

    def scale(self, x: Any, factor: float) -> Any:
        if isinstance(x, Heads):
            return replace(x, factor=factor)
        return self._elements(partial(activation.scale, factor=factor), x)

    def attention(
        self,
        il: int,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        scale: float,
        window: int = 0,
        sinks: Array | None = None,
    ) -> Value:
        n, n_head, a = self._n, q.n_head, self._a
        assert a.arrived is not None
        head_dim = q.x.width // n_head
        projections, rotation, of_heads = self._projected(q, k, v)
        division = step_division(n, n_head, a.k[il], a.tables, window)
        partial = self._b.new((n, n_head, division.n_entries, head_dim + 2), np.float32)
        y = self._new(n, n_head * head_dim)
        given = (projections, rotation, a.positions[:n], a.tables[:n], a.k[il], a.v[il], partial.array, a.arrived)
        self._launch(attention_step, *given, y.array, scale=scale, window=window, sinks=sinks, **of_heads)
        return Value(n, n_head * head_dim, y)

    def _projected(self, q: Heads, k: Heads, v: Heads) -> tuple[Projections, Rotation, dict[str, Any]]:
        """Q, K and V for the next launch, their rotation, and what else it does to heads. Raises NoFusedStep."""
        rotation = q.rotation or Rotation(None, None, True)
        of_k = k.rotation or Rotation(None, None, True)
        if (
            (rotation.cos is not of_k.cos or rotation.neox != of_k.neox)
            or v.rotation is not None
            or v.norm is not None
            or (k.factor, v.factor) != (1.0, 1.0)
        ):
            raise NoFusedStep("decode: attention needs equally rotated Q and K, an unchanged V, and no factor of K")
        projections, of_projections = self._projections(q.x, k.x, v.x)
        self._use(*of_projections)
        return projections, rotation, {"norms": (q.norm, k.norm), "eps": q.eps or k.eps, "q_factor": q.factor}

    def _projections(self, *values: Value) -> tuple[Projections, tuple[Buffer, ...]]:
        """Q, K and V and the buffers that have them, computed in as few launches as possible."""
        first = values[0]
        if isinstance(first, Columns) and all(isinstance(v, Columns) and v.of is first.of for v in values):
            assert first.of is not None
            whole = self.array(first.of).reshape(-1)
            assert first.of.buffer is not None
            starts = [v.start for v in values if isinstance(v, Columns)]
            width = first.of.width
            return Projections((whole, whole[starts[1] :], whole[starts[2] :]), (width,) * 3), (first.of.buffer,)
        pending = [v for v in values if isinstance(v, Product) and v.buffer is None]
        matrices = [p.w for p in pending if p.w is not None]
        x = pending[0].x if pending else None
        if len(pending) == 3 and all(p.x is x for p in pending) and few_rows.fits(matrices, first.n_rows):
            assert x is not None
            rows, of_rows = self._rows(x, *matrices)
            self._use(*of_rows)
            widths = [p.width for p in pending]
            y = self._new(first.n_rows, sum(widths))
            self._launch(few_rows.multiply, rows, matrices, [p.bias for p in pending], y.array)
            flat = y.array.reshape(-1)
            parts = (flat, flat[widths[0] :], flat[widths[0] + widths[1] :])
            return Projections(parts, (sum(widths),) * 3), (y,)
        q, k, v = self._arrays(*values)
        buffers = tuple(value.buffer for value in values if value.buffer is not None)
        return Projections((q.reshape(-1), k.reshape(-1), v.reshape(-1)), (q.shape[1], k.shape[1], v.shape[1])), buffers

    # --- Mixture of experts ---

    def top_experts(self, scores: Value, n_used: int) -> Choice:
        return Choice(scores, n_used)

    def take_experts(self, scores: Value, chosen: Choice) -> Shares:
        if chosen.scores is not scores:
            raise NoFusedStep("decode: take_experts needs the scores by which the experts were chosen")
        return Shares(chosen, soft_max=False)

    def row_soft_max(self, x: Any) -> Shares:
        if not isinstance(x, Shares) or x.soft_max:
            raise NoFusedStep("decode: row_soft_max supports only the chosen experts' scores")
        return replace(x, soft_max=True)

    def linear_experts(self, x: Value, w: PackedMatrix, chosen: Choice, bias: Array | None = None) -> Value:
        return Product(self._n * chosen.n_used, w.shape[1], x=x, w=w, bias=bias, choice=chosen)

    def sum_experts(self, experts: Value, shares: Shares) -> Value:
        if not shares.soft_max:
            raise NoFusedStep("decode: sum_experts needs the softmax of the chosen experts' scores")
        return ExpertSum(self._n, experts.width, experts=experts, shares=shares)

    def _combine(self, total: ExpertSum, residual: Value) -> Value:
        assert total.experts is not None
        assert total.shares is not None
        down, added = self._arrays(total.experts, residual)
        shares = self._shares(total.shares.choice)
        self._use(shares)
        y, squares = self._new_residual(total.n_rows, total.width)
        self._launch(moe.combine, down, shares.array, added, y.array, _array(squares))
        return Value(total.n_rows, total.width, y, squares)

    def _shares(self, choice: Choice) -> Buffer:
        """The shares of each row's experts."""
        if choice.shares is None:
            self._choose(choice)
        assert choice.shares is not None
        return choice.shares

    def _groups(self, product: Product, x: Value) -> tuple[Groups | None, tuple[Buffer, ...]]:
        """Which rows of x go to which expert of a product, and the buffers that say so."""
        choice = product.choice
        if choice is None:
            return None, ()
        size = self._group_size(product)
        if size not in choice.groups:
            self._group(choice, size)
        groups, buffers = choice.groups[size]
        return (groups.by_pair if x.n_rows == product.n_rows else groups), buffers

    def _note_groups(self, product: Product) -> None:
        """A product of experts was launched: kernels of few rows let the next one begin when they know the groups."""
        choice, size = product.choice, self._group_size(product)
        if choice is not None and self._n == 1 and product.w is not None and not product.w.is_float:
            groups, buffers = choice.groups[size]
            choice.groups[size] = (replace(groups, known=True), buffers)

    def _group(self, choice: Choice, size: int) -> None:
        """Divide the chosen experts' rows into groups of up to `size`. The first time, also choose the experts."""
        scores = choice.scores
        if (
            choice.shares is None
            and size == FEW_ROWS
            and isinstance(scores, Product)
            and scores.buffer is None
            and scores.choice is None
            and scores.w is not None
            and router.fits(scores.w, self._n, choice.n_used)
        ):
            self._route(choice, scores)
            return
        if choice.chosen is None:
            self._choose(choice)
        assert choice.chosen is not None
        self._use(choice.chosen)
        groups = self._new_groups(choice, size)
        self._launch(moe.group_experts, choice.chosen.array, scores.width, choice.n_used, groups, overlap=True)

    def _new_groups(self, choice: Choice, size: int) -> Groups:
        n_pairs = self._n * choice.n_used
        group = self._b.new((moe.most_groups(n_pairs, choice.scores.width, size), 3), np.int32)
        x_rows, y_rows = (self._b.new((n_pairs,), np.int32) for _ in range(2))
        groups = Groups(group.array, x_rows.array, y_rows.array, size, self._n)
        choice.groups[size] = (groups, (group, x_rows, y_rows))
        return groups

    def _route(self, choice: Choice, scores: Product) -> None:
        """The scores, the choice and groups of FEW_ROWS in one launch, with the norm in front of it."""
        x = scores.x
        assert x is not None
        deferred = _deferred_norm(x)
        if deferred is not None and deferred.x is not None and deferred.bias is None:
            (rows,), weight, eps = self._arrays(deferred.x), deferred.weight, deferred.eps
        else:
            (rows,), weight, eps = self._arrays(x), None, 0.0
        scores.buffer = self._new(self._n, scores.width)
        choice.shares = self._new(self._n, choice.n_used)
        places = (self._a.positions[: self._n], self._a.routed)
        outputs = (scores.buffer.array, choice.shares.array, self._new_groups(choice, FEW_ROWS))
        self._launch(router.route, rows, weight, eps, scores.w, scores.bias, *places, *outputs)

    def _choose(self, choice: Choice) -> None:
        """The choice by scores that are computed in a launch of their own."""
        (rows,) = self._arrays(choice.scores)
        choice.chosen = self._b.new((self._n, choice.n_used), np.int32)
        choice.shares = self._new(self._n, choice.n_used)
        outputs = (choice.chosen.array, choice.shares.array)
        self._launch(moe.route, rows, self._a.positions[: self._n], *outputs)

    def _group_size(self, product: Product) -> int:
        """The number of rows that a product with experts computes together."""
        return FEW_ROWS

    # --- Computing deferred values ---

    def _arrays(self, *values: Value) -> list[Array]:
        """The rows of values, computed if necessary, for use by the next launch."""
        for value in values:
            if value.buffer is None:
                value.buffer = self._computed(value)
        arrays = []
        for value in values:
            assert value.buffer is not None
            self._use(value.buffer)
            arrays.append(value.buffer.array)
        return arrays

    def _computed(self, value: Value) -> Buffer:
        if isinstance(value, Product):
            return self._multiply(value)[0]
        if isinstance(value, Norm):
            y = self._normed(value, floats=True, to_halves=None)[0].floats
            assert value.buffer is not None, y
            return value.buffer
        raise NoFusedStep(f"decode: there is no kernel that computes a {type(value).__name__} alone")

    def _multiply(self, product: Product, residual: Value | None = None) -> tuple[Buffer, Buffer | None]:
        """The rows of a product and, of sums with a residual, which norms read, their squares."""
        assert product.x is not None
        assert product.w is not None
        groups, of_groups = self._groups(product, product.x)
        rows, of_rows = self._rows(product.x, product.w)
        added = None if residual is None else self._arrays(residual)[0]
        self._use(*of_rows, *of_groups)
        if residual is None or product.w.is_float:
            y, squares = self._new(product.n_rows, product.width), None
        else:
            y, squares = self._new_residual(product.n_rows, product.width)
        options = {"bias": product.bias, "residual": added, "groups": groups, "squares": _array(squares)}
        self._launch(matmul.linear, rows, product.w, y.array, overlap=True, **options)
        self._note_groups(product)
        return y, squares

    def _rows(self, x: Value, *matrices: PackedMatrix) -> tuple[Rows, tuple[Buffer, ...]]:
        """The rows in a form that a product with these matrices reads, and their buffers."""
        w = matrices[0]
        halves = few_rows.reads_halves(w)
        for rows, buffers in x.prepared:
            found = rows.floats is not None if w.is_float else rows.converted and rows.converted.halves == halves
            if found:
                return rows, buffers
        deferred = _deferred_norm(x)
        has_squares = not w.is_float and self._n <= FEW_ROWS and (deferred is None or deferred.bias is None)
        if has_squares and self._n <= ROWS_IN_PRODUCT and can_prepare(matrices, self._n):
            return self._unprepared(x)
        if deferred is not None and not has_squares:
            # A router of floats is beside products with quantised weights, so their rows are made here as well.
            return self._normed(
                deferred, floats=w.is_float, to_halves=None if w.is_float and x.width % BLOCK else halves
            )
        unprepared, buffers = self._unprepared(x)
        if w.is_float:
            made = unprepared, buffers
        else:
            self._use(*buffers)
            converted, buffers = self._converted(x, halves)
            self._launch(quantize_rows.quantize_rows, unprepared, converted, overlap=True)
            made = Rows(x.n_rows, None, converted), buffers
        x.prepared.append(made)
        return made

    def _unprepared(self, x: Value) -> tuple[Rows, tuple[Buffer, ...]]:
        """Rows of floats, of which the product makes the form that it reads, after a norm that is still deferred."""
        deferred = _deferred_norm(x)
        if deferred is None:
            (floats,) = self._arrays(x)
            assert x.buffer is not None
            return Rows(x.n_rows, floats), (x.buffer,)
        source = deferred.x
        assert source is not None
        assert deferred.weight is not None
        (floats,) = self._arrays(source)
        assert source.buffer is not None
        if source.squares is None:
            source.squares = self._b.new((source.n_rows, source.width // GROUP), np.float32)
            self._launch(row_squares, floats, source.squares.array)
        self._use(source.buffer)
        norm = RowNorm(deferred.weight, deferred.eps)
        return Rows(x.n_rows, floats, norm=norm, squares=source.squares.array), (source.buffer, source.squares)

    def _normed(self, x: Norm, *, floats: bool, to_halves: bool | None) -> tuple[Rows, tuple[Buffer, ...]]:
        """A norm's rows as floats, and converted to halves or integers, or not (None)."""
        assert x.x is not None
        (before,) = self._arrays(x.x)
        plain = self._new(x.n_rows, x.width) if floats else None
        converted, buffers = (None, ()) if to_halves is None else self._converted(x, to_halves)
        rows = Rows(x.n_rows, None if plain is None else plain.array, converted)
        if x.bias is None:
            self._launch(norm.rms_norm_rows, before, x.weight, x.eps, rows)
        else:
            self._launch(norm.layer_norm_rows, before, x.weight, x.bias, x.eps, rows)
        if plain is not None:
            buffers = (plain, *buffers)
        x.buffer = plain
        x.prepared.append((rows, buffers))
        return rows, buffers

    def _converted(self, x: Value, halves: bool) -> tuple[Converted, tuple[Buffer, ...]]:
        """Space for the converted rows of a value, and its buffers."""
        shapes = Converted.shapes(x.n_rows, x.width)
        dtypes = (np.uint8, np.int32, np.float32)
        buffers = tuple(self._b.new(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        return Converted(halves, *(buffer.array for buffer in buffers)), buffers

    def _new(self, n_rows: int, width: int) -> Buffer:
        return self._b.new((n_rows, width), np.float32)

    def _new_residual(self, n_rows: int, width: int) -> tuple[Buffer, Buffer | None]:
        """Buffers for new rows and, if a product may norm them, their squares."""
        squared = self._n <= FEW_ROWS and width % BLOCK == 0
        return self._new(n_rows, width), self._b.new((n_rows, width // GROUP), np.float32) if squared else None

    def _use(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            self._b.use(buffer)

    def _launch(self, binding: Callable[..., None], *arguments: Any, **named: Any) -> None:
        binding(self._kernels, *arguments, **named)
        self._b.launched()


def _array(buffer: Buffer | None) -> Array | None:
    return None if buffer is None else buffer.array


def _deferred_norm(x: Value) -> Norm | None:
    """x if it is a norm that has not been computed."""
    return x if isinstance(x, Norm) and x.buffer is None else None


def _as_product(value: Value) -> Value:
    """Columns of a deferred product, as a product with only these rows of its matrix; other values unchanged."""
    if not isinstance(value, Columns) or not isinstance(value.of, Product) or value.of.buffer is not None:
        return value
    whole = value.of
    assert whole.w is not None
    if not whole.w.is_float and (value.start % TILE_ROWS or value.width % TILE_ROWS):
        return value  # a tile has outputs of two parts
    w = rows_of(whole.w, value.start, value.start + value.width)
    bias = None if whole.bias is None else whole.bias[value.start : value.start + value.width]
    return Product(whole.n_rows, value.width, x=whole.x, w=w, bias=bias, choice=whole.choice)
