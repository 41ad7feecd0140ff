"""The operations of `refengine.ops.Ops` as raw kernels: weights stay quantised, sums have one order.

Names, shapes and meaning are those of `Ops`; the numerics profile is `fast`. What is checked in Python before a launch
(sizes, types, bounds: W-1431) raises KernelError, with the tensor's name where there is one. Results do not depend on
how many rows and sequences come together: kernels are chosen by their number, but every one of an operation adds in the
same order (see the header of each file in kernels_cu/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine.cuda import reference
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.memory import Arena, DeviceMemory, aligned
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError
from refengine.ops import rope
from refengine.ops.numerics import PROFILES

Array = Any
Angles = tuple[Array, Array]
Type = GGMLQuantizationType

FEW_ROWS, MANY_ROWS = 8, 64  # that a block of rows8_*, of rows64_* multiplies
ATTENTION_ROWS, TILE, SPLIT = 16, 64, 512  # of a block of threads; positions of a tile, of a split
HEAD_DIMS = (32, 64, 96, 128)  # for which attention is compiled; smaller ones are filled up
BUSY = 264  # blocks of threads that keep a large GPU busy: with fewer, attention cuts the positions up


@dataclass(frozen=True)
class PagedRows:
    """K or V of a layer. values: (n_blocks, block_size, n_head_kv, head_dim) float16, each row times 2^-e; exponents:
    (n_blocks, block_size, n_head_kv) uint8, e + 127; arena: where they are."""

    values: Array
    exponents: Array
    arena: Arena

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.exponents.nbytes)


@dataclass(frozen=True)
class _Prepared:
    """Activation rows as products take them; see kernels_cu/activations.cu."""

    halves: Array
    sums: Array
    scale: Array


class KernelOps:
    """Operations of one device: `cuda`, or `host` for the kernels' build on the CPU.

    xp: numpy for the host, cupy for CUDA. memory: where caches are allocated. attention_by: `flash`, the kernels, or
    `reference`, array code that writes the score matrix, to compare.
    """

    def __init__(self, xp: Any, kernels: Kernels, memory: DeviceMemory, attention_by: str = "flash") -> None:
        self.xp, self.kernels, self.memory = xp, kernels, memory
        self.numerics = PROFILES["fast"]
        self.attention_by = attention_by
        # What the operations of one layer ask for again and again, by the object that it was made from.
        self._prepared: tuple[Any, _Prepared] | None = None
        self._spans: tuple[Any, tuple[Array, Array, Array]] | None = None
        self._grouped: dict[int, tuple[Any, tuple[Array, Array, Array]]] = {}

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """Where arrays of a forward pass are allocated meanwhile. Nothing of it is kept for the next pass."""
        with self.memory.workspace():
            yield
        self._prepared = self._spans = None
        self._grouped.clear()

    # --- Embedding and products ---

    def embedding(self, w: PackedMatrix, ids: np.ndarray) -> Array:
        n_out, n_in = w.shape
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_out:
            raise KernelError(f"{w.name}: rows {ids.min()} to {ids.max()} were asked for, it has {n_out}")
        out = self._empty(len(ids), n_in)
        there = self.xp.asarray(ids.astype(np.int32))
        kernel = f"embedding_{w.type.name.lower()}"
        if is_float(w):
            arguments = [float_plane(w), there, out, np.int32(n_in)]
            self._launch("embedding", kernel, (len(ids),), 128, arguments, what=w.name)
        else:
            grid = (len(ids), -(-n_in // 256))
            self._launch("embedding", kernel, grid, 32, [*w.arguments(), there, out, np.int32(n_in)], what=w.name)
        return out

    def rows(self, x: Array, rows: np.ndarray) -> Array:
        return x if np.array_equal(rows, np.arange(x.shape[0])) else x[self.xp.asarray(rows)]

    def linear(self, x: Array, w: PackedMatrix, bias: Array | None = None) -> Array:
        if len(w.shape) != 2 or x.shape[1:] != (w.shape[1],):
            raise KernelError(f"{w.name}: a matrix {w.shape} cannot multiply rows {x.shape}")
        y = self._empty(x.shape[0], w.shape[0])
        if x.shape[0] == 0:  # logits that nobody asked for
            return y
        self._product(x, w, (None, None, None), bias, y, x.shape[0], x.shape[0])
        return y

    def linear_experts(self, x: Array, w: PackedMatrix, chosen: Array) -> Array:
        n_tokens, n_used = chosen.shape
        n_expert, n_out, n_in = w.shape
        if x.shape not in ((n_tokens, 1, n_in), (n_tokens, n_used, n_in)):
            raise KernelError(f"{w.name}: experts {w.shape} cannot multiply rows {x.shape} for {chosen.shape} choices")
        share = n_used if x.shape[1] == 1 else 1
        n_pairs = n_tokens * n_used
        size = FEW_ROWS if is_float(w) or n_pairs <= FEW_ROWS * n_expert else MANY_ROWS
        y = self._empty(n_tokens, n_used, n_out)
        groups = self._groups(chosen, n_expert, size, share)
        rows = x.reshape(-1, n_in)
        self._product(rows, w, groups, None, y.reshape(n_pairs, n_out), n_pairs, n_pairs, size, len(groups[0]))
        return y

    def _groups(self, chosen: Array, n_expert: int, size: int, share: int) -> tuple[Array, Array, Array]:
        """Groups of up to `size` pairs of token and rank that go to one expert; see kernels_cu/moe.cu."""
        key = hash((n_expert, size, share))
        known = self._grouped.get(key)
        if known is not None and known[0] is chosen:
            return known[1]
        n_pairs = int(chosen.size)
        n_groups = min(n_pairs, n_expert) + n_pairs // size
        integers = self.xp.int32
        groups = self.xp.empty((n_groups, 3), integers)
        x_rows, y_rows = self.xp.empty(n_pairs, integers), self.xp.empty(n_pairs, integers)
        pairs = self.xp.ascontiguousarray(chosen, dtype=integers).reshape(-1)
        sizes = [np.int32(n) for n in (n_pairs, n_expert, n_groups, size, share)]
        self._launch("moe", "group_experts", (1,), 256, [pairs, groups, x_rows, y_rows, *sizes], 8 * n_expert)
        self._grouped[key] = (chosen, (groups, x_rows, y_rows))
        return groups, x_rows, y_rows

    def _product(
        self,
        x: Array,
        w: PackedMatrix,
        groups: tuple[Array | None, Array | None, Array | None],
        bias: Array | None,
        y: Array,
        n_rows: int,
        n_slots: int,
        size: int = 0,
        n_groups: int = 0,
    ) -> None:
        n_out, n_in = w.shape[-2:]
        kind = w.type.name.lower()
        sizes = [np.int32(n_out), np.int32(n_in), np.int32(n_rows)]
        if is_float(w):
            grid = (-(-n_out // 8), n_groups or -(-n_slots // FEW_ROWS))
            arguments = [float_plane(w), self._rows(x), *groups, bias, None, y, *sizes]
            self._launch("matmul_f32", f"rows8_{kind}", grid, 256, arguments, what=w.name)
            return
        given = self._activations(x)
        tiles, segments = -(-n_out // 16), -(-n_in // 256)
        size = size or (FEW_ROWS if n_slots <= FEW_ROWS else MANY_ROWS)
        n_groups = n_groups or -(-n_slots // size)
        arguments = [*w.arguments(), given.halves, given.sums, given.scale, *groups, bias, None, y, *sizes]
        if size == FEW_ROWS:
            blocks, warps = rows8_launch(kind, tiles, segments, n_groups, self.kernels.n_multiprocessors)
            self._launch(
                "matmul",
                f"rows8_{kind}",
                (blocks, n_groups),
                32 * warps,
                arguments,
                1024 * segments,
                what=w.name,
                overlap=True,
            )
        else:
            self._launch("matmul", f"rows64_{kind}", (-(-tiles // 4), n_groups), 128, arguments, what=w.name)

    def _activations(self, x: Array) -> _Prepared:
        """x as halves. Q, K and V ask for the same rows one after another: the last answer is kept."""
        if self._prepared is not None and self._prepared[0] is x:
            return self._prepared[1]
        rows = self._rows(x)
        n_rows, n_in = rows.shape
        given = _Prepared(
            self.xp.empty((n_rows, n_in), self.xp.float16),
            self.xp.empty((n_rows, n_in // 32), self.xp.uint32),
            self._empty(n_rows),
        )
        threads = min(1024, max(64, n_in // 8 // 32 * 32))
        arguments = [rows, given.halves, given.scale, given.sums, np.int32(n_in)]
        self._launch("activations", "activations_f16", (n_rows,), threads, arguments)
        self._prepared = (x, given)
        return given

    # --- Norms and RoPE ---

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self._norm("rms_norm_f32", x, [weight], eps)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self._norm("layer_norm_f32", x, [weight, bias], eps)

    def _norm(self, kernel: str, x: Array, vectors: Sequence[Array], eps: float) -> Array:
        n = x.shape[-1]
        if any(v.shape != (n,) for v in vectors):
            raise KernelError(f"{kernel}: rows of {n}, weights of {[v.shape for v in vectors]}")
        rows, y = self._rows(x), self._empty(*x.shape)
        sizes = [np.int32(n), np.float32(eps)]
        self._launch("norm", kernel, (int(rows.size) // n,), 256, [rows, *vectors, y, *sizes])
        return y

    def rope_angles(self, positions: np.ndarray, constants: Any, freq_factors: Array | None = None) -> Angles:
        on_host = freq_factors if freq_factors is None or self.xp is np else freq_factors.get()
        cos, sin = rope.rope_angles(positions, constants, on_host, np.float32)
        return self.xp.asarray(cos), self.xp.asarray(sin)

    def rope_neox(self, x: Array, angles: Angles) -> Array:
        return self._rope("rope_neox_f32", x, angles)

    def rope_norm(self, x: Array, angles: Angles) -> Array:
        return self._rope("rope_norm_f32", x, angles)

    def _rope(self, kernel: str, x: Array, angles: Angles) -> Array:
        n_tokens, n_head, head_dim = x.shape
        half = angles[0].shape[-1]
        if any(a.shape != (n_tokens, 1, half) for a in angles) or 2 * half > head_dim:
            raise KernelError(f"{kernel}: heads {x.shape}, angles {[a.shape for a in angles]}")
        y = self._empty(*x.shape)
        arguments = [self._rows(x), *angles, y, np.int32(half), np.int32(head_dim)]
        self._launch("rope", kernel, (n_tokens, n_head), 64, arguments)
        return y

    # --- Attention ---

    def kv_arrays(self, n: int, shape: tuple[int, ...]) -> list[PagedRows]:
        """Parts of a KV cache, all in one arena. Raises DeviceError where they do not fit."""
        arena = self.memory.arena("kv", kv_bytes(n, shape))
        return [PagedRows(arena.take(shape, np.float16), arena.take(shape[:-1], np.uint8), arena) for _ in range(n)]

    def kv_append(self, cache: PagedRows, new: Array, slots: np.ndarray) -> None:
        n_blocks, block_size, n_head_kv, head_dim = cache.values.shape
        n_tokens = new.shape[0]
        if new.shape != (len(slots), n_head_kv, head_dim):
            raise KernelError(f"kv_append: rows {new.shape} for {len(slots)} slots of a cache {cache.values.shape}")
        if n_tokens and not 0 <= slots.min() <= slots.max() < n_blocks * block_size:
            raise KernelError(f"kv_append: slots {slots.min()} to {slots.max()} of {n_blocks * block_size}")
        there = self.xp.asarray(slots)
        arguments = [self._rows(new), there, cache.values, cache.exponents, np.int32(head_dim)]
        self._launch("attention", "kv_append_f16", (n_tokens, n_head_kv), 32, arguments)

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
        """As `Ops.attention`; of its probes, only `kqv` exists. splits: cut positions up, or not (None: by size)."""
        if self.attention_by == "reference":
            return reference.attention(
                self.xp, Qcur, k_cache, v_cache, batch, scale=scale, window=window, sinks=sinks, probe=probe
            )
        n_tokens, n_head, head_dim = Qcur.shape
        _, block_size, n_head_kv, cached_dim = k_cache.values.shape
        if head_dim != cached_dim or n_head % n_head_kv or head_dim % 8 or head_dim > HEAD_DIMS[-1]:
            raise KernelError(
                f"attention: {n_head} heads of {head_dim} over a cache of {n_head_kv} of {cached_dim}; kernels take "
                f"multiples of 8 up to {HEAD_DIMS[-1]}"
            )
        if block_size % TILE:
            raise KernelError(f"attention: blocks of {block_size} positions are no multiple of {TILE}")
        tables, spans, tiles = self._described(batch, n_head // n_head_kv)
        longest = max(span.n_kv for span in batch.spans)
        furthest = min(span.n_kv - (span.stop - span.start) for span in batch.spans)
        first = max(furthest - window + 1, 0) // SPLIT if window else 0
        n_splits = -(-longest // SPLIT) - first
        if splits is None:
            splits = n_splits > 1 and len(tiles) * n_head_kv < BUSY
        width = next(d for d in HEAD_DIMS if d >= head_dim)
        kernel = f"attention_{'splits' if splits else 'rows'}_{width}"
        y = self._empty(n_tokens, n_head * head_dim)
        out = self._empty(n_tokens, n_head, n_splits, head_dim + 2) if splits else y
        sizes = [np.int32(n) for n in (n_head, n_head_kv, head_dim, block_size, window)]
        caches = [k_cache.values, v_cache.values, k_cache.exponents, v_cache.exponents]
        arguments = [self._rows(Qcur), *caches, tables, sinks, spans, tiles, out, *sizes]
        arguments += [np.float32(scale), np.int32(first), np.int32(n_splits)]
        grid = (len(tiles), n_head_kv, n_splits if splits else 1)
        self._launch("attention", kernel, grid, 256, arguments, attention_shared(width))
        if splits:
            sizes = [np.int32(n_head), np.int32(head_dim), np.int32(n_splits)]
            self._launch("attention", "attention_merge", (n_tokens, n_head), head_dim, [out, sinks, y, *sizes])
        for span in batch.spans:
            part = y[span.start : span.stop].reshape(-1, n_head, head_dim)
            shown = probe("kqv", x=part.transpose(1, 0, 2))
            part[...] = shown.transpose(1, 0, 2)
        return y

    def _described(self, batch: Any, group: int) -> tuple[Array, Array, Array]:
        """Block tables, spans and tiles of rows of a batch, on the device; the same for every layer."""
        if self._spans is not None and self._spans[0] is batch:
            return self._spans[1]
        spans, tiles, tables, n = [], [], [], 0
        for i, span in enumerate(batch.spans):
            length = span.stop - span.start
            spans.append((span.start, length, span.n_kv, n))
            tiles += [(i, row) for row in range(0, length * group, ATTENTION_ROWS)]
            tables.append(span.block_table)
            n += len(span.block_table)
        lists = (np.concatenate(tables), np.array(spans), np.array(tiles))
        there = tuple(self.xp.asarray(a.astype(np.int32)) for a in lists)
        self._spans = (batch, there)
        return there

    # --- Element by element, and experts ---

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._elements("swiglu_f32", gate, up)

    def swiglu_clamped(self, gate: Array, up: Array) -> Array:
        return self._elements("swiglu_clamped_f32", gate, up)

    def gelu(self, x: Array) -> Array:
        return self._elements("gelu_f32", x)

    def _elements(self, kernel: str, *given: Array) -> Array:
        if any(a.shape != given[0].shape for a in given):
            raise KernelError(f"{kernel}: shapes {[a.shape for a in given]}")
        y = self._empty(*given[0].shape)
        n = int(y.size)
        self._launch("activation", kernel, (-(-n // 256),), 256, [*map(self._rows, given), y, np.int64(n)])
        return y

    def top_experts(self, scores: Array, n_used: int) -> Array:
        n_tokens, n_expert = scores.shape
        if not 1 <= n_used <= n_expert:
            raise KernelError(f"top_experts: {n_used} of {n_expert} experts")
        chosen = self.xp.empty((n_tokens, n_used), self.xp.int32)
        sizes = [np.int32(n_expert), np.int32(n_used)]
        self._launch("moe", "top_experts_f32", (n_tokens,), 32, [self._rows(scores), chosen, *sizes])
        return chosen

    def take_experts(self, scores: Array, chosen: Array) -> Array:
        return self.xp.take_along_axis(scores, chosen, axis=-1)

    def row_soft_max(self, x: Array) -> Array:
        if x.shape[-1] > 32:
            raise KernelError(f"row_soft_max: rows of {x.shape[-1]}, at most 32 are taken")
        y = self._empty(*x.shape)
        n = x.shape[-1]
        self._launch("moe", "row_soft_max_f32", (int(x.size) // n,), 32, [self._rows(x), y, np.int32(n)])
        return y

    def sum_experts(self, experts: Array) -> Array:
        n_tokens, n_used, n = experts.shape
        y = self._empty(n_tokens, n)
        sizes = [np.int32(n_used), np.int32(n), np.int64(n_tokens * n)]
        self._launch("moe", "sum_experts_f32", (-(-n_tokens * n // 256),), 256, [self._rows(experts), y, *sizes])
        return y

    # --- Launching ---

    def _launch(
        self,
        file: str,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        what: str = "",
        overlap: bool = False,
    ) -> None:
        if all(grid):  # no rows: nothing to do
            self.kernels.launch(file, kernel, grid, threads, arguments, shared_bytes, overlap, what=what)

    def _empty(self, *shape: int) -> Array:
        return self.xp.empty(shape, self.xp.float32)

    def _rows(self, x: Array) -> Array:
        return self.xp.ascontiguousarray(x, dtype=self.xp.float32)


def kv_bytes(n: int, shape: tuple[int, ...]) -> int:
    """What `kv_arrays` takes."""
    return n * (aligned(2 * prod(shape)) + aligned(prod(shape[:-1])))


WIDE = ("q8_0", "q4_k", "mxfp4")  # types of which 20 warps fit a multiprocessor; of the others, 16 do


def rows8_launch(kind: str, n_tiles: int, n_segments: int, n_groups: int, n_multiprocessors: int) -> tuple[int, int]:
    """Blocks and warps of each for rows8_*; sums do not depend on them.

    Of the numbers of warps, the one with the shortest time by this reckoning: a multiprocessor that has n warps takes
    n + 8 units for a segment of each (8: what a lone warp would wait for its loads), which comes again for each tile
    and for each segment of a warp. F16, which only waits for memory, has as many as there may be. Where there are many
    more tiles than blocks at once, blocks stay and take several (measured on an H200: 3 to 5 % for 600 MB).
    """
    most, resident = (10, 20) if kind in WIDE else (8, 16)
    best: tuple[int, int, int] | None = None
    for warps in range(min(most, n_segments) if kind == "f16" else 1, min(most, n_segments) + 1):
        of_one = resident // warps  # blocks on a multiprocessor
        at_once = max(1, n_multiprocessors * of_one // n_groups)
        rounds = -(-n_tiles // at_once)
        busy = min(of_one, -(-n_tiles * n_groups // n_multiprocessors)) * warps
        units = rounds * -(-n_segments // warps) * (busy + 8)
        if best is None or units < best[0]:
            best = units, n_tiles if rounds <= 3 else -(-n_tiles // rounds), warps
    assert best is not None
    return best[1:]


def attention_shared(width: int) -> int:
    """Bytes of `Shared` in kernels_cu/attention.cu."""
    groups, rows, warps = width // 32, ATTENTION_ROWS, SPLIT // TILE
    halves = rows * (groups | 1) * 32 * 2
    return halves + 4 * (rows + 4 * warps * rows + 4 * rows + warps * groups * 16 * 32)


def is_float(w: PackedMatrix) -> bool:
    return w.type in (Type.F32, Type.BF16)


def float_plane(w: PackedMatrix) -> Array:
    """Rows of an F32 or BF16 matrix as its kernel takes them."""
    return w.planes["low"].view(np.float32 if w.type == Type.F32 else np.uint16)
