"""The operations of `refengine.ops.Ops` as raw kernels: weights stay quantised, and sums have a fixed order.

Names, shapes and meaning are those of `Ops`; the numerics profile is `fast`. Outputs come from the pool of a forward
pass; the launches are in `cuda.kernels`. Sizes, types and bounds are checked before a launch (W-1431) and raise
KernelError, with the tensor's name if there is one. Results do not depend on the number of rows and sequences in the
batch: the kernel is chosen by that number, but all kernels of an operation add in the same order (see the header of
each file in kernels_cu/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda import reference
from refengine.cuda.kernels import activation, embedding, matmul, moe, norm, quantize_rows
from refengine.cuda.kernels import attention as attending
from refengine.cuda.kernels import rope as rotary
from refengine.cuda.kernels.attention import BatchLayout, PagedRows
from refengine.cuda.kernels.few_rows import reads_halves
from refengine.cuda.kernels.moe import Groups
from refengine.cuda.kernels.quantize_rows import Converted, Rows
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.memory import DeviceMemory, aligned
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import address_of
from refengine.cuda.upload import together
from refengine.errors import KernelError
from refengine.ops import rope
from refengine.ops.numerics import PROFILES

Angles = tuple[Array, Array]


@dataclass
class PassMemo:
    """Intermediate results of one forward pass that later operations on the same array reuse.

    rows: the last rows that a product read, and their converted form (Q, K and V read the same rows one after another).
    batch: the last batch and its layout. slots: the last slots of the cache, their bounds, and all on the device.
    groups: by sizes, the last choice of experts and its groups.
    """

    rows: tuple[Any, Rows] | None = None
    batch: tuple[Any, BatchLayout] | None = None
    slots: tuple[np.ndarray, tuple[int, int], Array] | None = None
    groups: dict[tuple[int, int, int], tuple[Any, Groups]] = field(default_factory=dict)


class KernelOps:
    """The operations of one device: `cuda`, or `host` for the kernels built for the CPU.

    xp: numpy for the host, cupy for CUDA. memory: where caches are allocated. attention_by: `flash` for the kernels, or
    `reference` for array code that writes the score matrix, for comparisons.
    """

    def __init__(self, xp: Any, kernels: Kernels, memory: DeviceMemory, attention_by: str = "flash") -> None:
        self.xp, self.kernels, self.memory = xp, kernels, memory
        self.numerics = PROFILES["fast"]
        self.attention_by = attention_by
        self.memo = PassMemo()
        self._factors: dict[int, tuple[Array, np.ndarray]] = {}  # of RoPE, by id: on the device and on the host

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """The context of a forward pass, in which its arrays come from the pool. Nothing is kept for the next pass."""
        self.memo = PassMemo()
        with self.memory.workspace():
            yield
        self.memo = PassMemo()

    # --- Embedding and products ---

    def embedding(self, w: PackedMatrix, ids: np.ndarray) -> Array:
        n_out, n_in = w.shape
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_out:
            raise KernelError(f"{w.name}: rows {ids.min()} to {ids.max()} were requested, it has {n_out}")
        y = self._empty(len(ids), n_in)
        embedding.embedding(self.kernels, w, self.xp.asarray(ids.astype(np.int32)), y)
        return y

    def rows(self, x: Array, rows: np.ndarray) -> Array:
        return x if np.array_equal(rows, np.arange(x.shape[0])) else x[self.xp.asarray(rows)]

    def linear(self, x: Array, w: PackedMatrix, bias: Array | None = None) -> Array:
        if len(w.shape) != 2 or x.shape[1:] != (w.shape[1],):
            raise KernelError(f"{w.name}: a matrix {w.shape} cannot multiply rows {x.shape}")
        y = self._empty(x.shape[0], w.shape[0])
        if x.shape[0]:  # there are no rows if no logits are needed
            matmul.linear(self.kernels, self._rows_for(x, w), w, y, bias=bias)
        return y

    def linear_experts(self, x: Array, w: PackedMatrix, chosen: Array) -> Array:
        n_tokens, n_used = chosen.shape
        n_expert, n_out, n_in = w.shape
        if x.shape not in ((n_tokens, 1, n_in), (n_tokens, n_used, n_in)):
            raise KernelError(f"{w.name}: experts {w.shape} cannot multiply rows {x.shape} for {chosen.shape} choices")
        y = self._empty(n_tokens, n_used, n_out)
        share = n_used if x.shape[1] == 1 else 1
        groups = self._groups(chosen, n_expert, matmul.group_size(w, n_tokens * n_used), share)
        rows = self._rows_for(x, w)
        matmul.linear(self.kernels, rows, w, y.reshape(-1, n_out), groups=groups)
        return y

    def _groups(self, chosen: Array, n_expert: int, size: int, share: int) -> Groups:
        """Groups of up to `size` pairs of token and rank that use the same expert."""
        known = self.memo.groups.get((n_expert, size, share))
        if known is not None and known[0] is chosen:
            return known[1]
        n_pairs, integers = int(chosen.size), self.xp.int32
        n_groups = moe.most_groups(n_pairs, n_expert, size)
        slots = [self.xp.empty(n_pairs, integers) for _ in range(2)]
        groups = Groups(self.xp.empty((n_groups, 3), integers), slots[0], slots[1], size)
        pairs = self.xp.ascontiguousarray(chosen, dtype=integers).reshape(-1)
        moe.group_experts(self.kernels, pairs, n_expert, share, groups)
        self.memo.groups[n_expert, size, share] = (chosen, groups)
        return groups

    def _rows_for(self, x: Array, w: PackedMatrix) -> Rows:
        """The rows of x (..., n_in) in the form that a product with w reads."""
        n_in = x.shape[-1]
        floats = self._floats(x).reshape(-1, n_in)
        n = len(floats)
        if w.is_float:
            return Rows(n, floats)
        halves = reads_halves(w)
        if self.memo.rows is not None:
            known, rows = self.memo.rows
            assert rows.converted is not None
            is_same = known.shape[-1] == n_in and known.size == x.size and address_of(known) == address_of(x)
            if is_same and rows.converted.halves == halves:
                return rows
        converted = Converted.empty(self.xp, n, n_in, halves=halves)
        quantize_rows.quantize_rows(self.kernels, Rows(len(floats), floats), converted)
        rows = Rows(n, floats, converted)
        self.memo.rows = (x, rows)
        return rows

    # --- Norms and RoPE ---

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """The norm; of rows, also the form that most products read."""
        y = self._empty(*x.shape)
        if x.ndim > 2 or x.shape[-1] % quantize_rows.BLOCK:
            norm.rms_norm(self.kernels, self._floats(x), weight, eps, y)
            return y
        rows = Rows(len(y), y, Converted.empty(self.xp, *y.shape, halves=False))
        norm.rms_norm_rows(self.kernels, self._floats(x), weight, eps, rows)
        self.memo.rows = (y, rows)
        return y

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        y = self._empty(*x.shape)
        norm.layer_norm(self.kernels, self._floats(x), weight, bias, eps, y)
        return y

    def rope_angles(self, positions: np.ndarray, constants: Any, freq_factors: Array | None = None) -> Angles:
        factors: Any = freq_factors
        if factors is not None and self.xp is not np:
            if id(factors) not in self._factors:
                self._factors[id(factors)] = (factors, factors.get())  # waits for the device, so it is kept
            factors = self._factors[id(factors)][1]
        cos, sin = rope.rope_angles(positions, constants, factors, np.float32)
        return self.xp.asarray(cos), self.xp.asarray(sin)

    def rope_neox(self, x: Array, angles: Angles) -> Array:
        return self._rope(x, angles, True)

    def rope_norm(self, x: Array, angles: Angles) -> Array:
        return self._rope(x, angles, False)

    def _rope(self, x: Array, angles: Angles, neox: bool) -> Array:
        y = self._empty(*x.shape)
        rotary.rope(self.kernels, self._floats(x), angles, y, neox=neox)
        return y

    # --- Attention ---

    def kv_arrays(self, n: int, shape: tuple[int, ...]) -> list[PagedRows]:
        """The `n` parts of a KV cache, all in one arena. shape: as in `Ops`. Raises DeviceError if they do not fit."""
        arena = self.memory.arena("kv", kv_bytes(n, shape))
        return [PagedRows.of(arena.take, shape, arena) for _ in range(n)]

    def kv_append(self, cache: PagedRows, new: Array, slots: np.ndarray) -> None:
        if self.memo.slots is None or self.memo.slots[0] is not slots:
            bounds = (int(slots.min()), int(slots.max())) if len(slots) else (0, 0)
            self.memo.slots = (slots, bounds, self.xp.asarray(slots))
        _, (lowest, highest), on_device = self.memo.slots
        n_blocks, _, block_size, _ = cache.values.shape
        if not 0 <= lowest <= highest < n_blocks * block_size:
            raise KernelError(f"kv_append: slots {lowest} to {highest} of {n_blocks * block_size}")
        attending.kv_append(self.kernels, self._floats(new), on_device, cache)

    def kv_copy(self, cache: PagedRows, source: int, target: int) -> None:
        cache.values[target] = cache.values[source]
        cache.exponents[target] = cache.exponents[source]

    def attention(
        self,
        Qcur: Array,
        k_cache: PagedRows,
        v_cache: PagedRows,
        batch: Any,
        *,
        scale: float,
        probe: Callable[..., Array],
        window: int = 0,
        sinks: Array | None = None,
        splits: bool | None = None,
    ) -> Array:
        """Like `Ops.attention`, but with the probe `kqv` only. splits: whether to split positions (None: by size)."""
        if self.attention_by == "reference":
            return reference.attention(
                self.xp, Qcur, k_cache, v_cache, batch, scale=scale, window=window, sinks=sinks, probe=probe
            )
        n_tokens, n_head, head_dim = Qcur.shape
        n_head_kv = k_cache.values.shape[1]
        attending.check_cache(n_head, head_dim, k_cache)
        layout = self._layout(batch, n_head // n_head_kv)
        cut = attending.splits_of(layout, Qcur.shape, n_head_kv, window, splits)
        partial = self._empty(n_tokens, n_head, cut[1], head_dim + 2) if cut[2] else None
        y = self._empty(n_tokens, n_head * head_dim)
        attending.attention(
            self.kernels,
            self._floats(Qcur),
            k_cache,
            v_cache,
            layout,
            y,
            scale=scale,
            window=window,
            sinks=sinks,
            splits=cut,
            partial=partial,
        )
        for span in batch.spans:
            part = y[span.start : span.stop].reshape(-1, n_head, head_dim).transpose(1, 0, 2)
            shown = probe("kqv", x=part)
            if shown is not part:
                part[...] = shown
        return y

    def _layout(self, batch: Any, group: int) -> BatchLayout:
        """The block tables, spans and tiles of a batch, equal for all layers. group: query heads per KV head."""
        if self.memo.batch is not None and self.memo.batch[0] is batch:
            return self.memo.batch[1]
        made = layout_of(batch, group)
        layout = made.on_device(together(self.xp, made.arrays))
        self.memo.batch = (batch, layout)
        return layout

    # --- Element by element, and experts ---

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._elements(activation.swiglu, gate, up)

    def swiglu_clamped(self, gate: Array, up: Array) -> Array:
        return self._elements(activation.swiglu_clamped, gate, up)

    def gelu(self, x: Array) -> Array:
        return self._elements(activation.gelu, x)

    def _elements(self, launch: Callable[..., None], *arrays: Array) -> Array:
        if any(a.shape != arrays[0].shape for a in arrays):
            raise KernelError(f"{launch.__name__}: shapes {[a.shape for a in arrays]}")
        y = self._empty(*arrays[0].shape)
        launch(self.kernels, *map(self._floats, arrays), y)
        return y

    def top_experts(self, scores: Array, n_used: int) -> Array:
        chosen = self.xp.empty((len(scores), n_used), self.xp.int32)
        moe.top_experts(self.kernels, self._floats(scores), chosen)
        return chosen

    def take_experts(self, scores: Array, chosen: Array) -> Array:
        return self.xp.take_along_axis(scores, chosen, axis=-1)

    def row_soft_max(self, x: Array) -> Array:
        y = self._empty(*x.shape)
        moe.row_soft_max(self.kernels, self._floats(x), y)
        return y

    def sum_experts(self, experts: Array) -> Array:
        n_tokens, _, n = experts.shape
        y = self._empty(n_tokens, n)
        moe.sum_experts(self.kernels, self._floats(experts), y)
        return y

    def _empty(self, *shape: int) -> Array:
        return self.xp.empty(shape, self.xp.float32)

    def _floats(self, x: Array) -> Array:
        return self.xp.ascontiguousarray(x, dtype=self.xp.float32)


@dataclass(frozen=True)
class HostLayout:
    """A `BatchLayout` whose arrays are on the host, and of any integer type: tables, spans and tiles."""

    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
    longest: int
    furthest: int

    def on_device(self, arrays: Sequence[Array]) -> BatchLayout:
        """The layout with copies of its arrays on the device, int32."""
        tables, spans, tiles = arrays
        return BatchLayout(tables, spans, tiles, self.longest, self.furthest)


def layout_of(batch: Any, group: int) -> HostLayout:
    """The layout of a batch. group: query heads per KV head."""
    spans, tiles, n = [], [], 0
    for i, span in enumerate(batch.spans):
        length = span.stop - span.start
        spans.append((span.start, length, span.n_kv, n))
        rows = np.arange(0, length * group, attending.BLOCK_ROWS)
        tiles.append(np.stack([np.full_like(rows, i), rows], axis=1))
        n += len(span.block_table)
    tables = np.concatenate([span.block_table for span in batch.spans])
    longest = max(span.n_kv for span in batch.spans)
    furthest = min(span.n_kv - (span.stop - span.start) for span in batch.spans)
    return HostLayout((tables, np.array(spans), np.concatenate(tiles)), longest, furthest)


def kv_bytes(n: int, shape: tuple[int, ...]) -> int:
    """The bytes that `kv_arrays` allocates."""
    return n * (aligned(2 * prod(shape)) + aligned(prod(shape[:-1])))
