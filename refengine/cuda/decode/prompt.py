"""A pass over prompts with a model's `decode()`: the fused operations of a decode step, for any number of rows.

A row is a token of a sequence, with its position and its sequence's blocks of the cache; a sequence may have several.
So a prompt takes about as few launches as a step, and has the bits of `forward()`. What differs from a step: attention
of several rows to the same positions, larger groups of rows that use the same expert, and buffers, which come from the
pool, because the number of rows is another each time. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cache.paged import Batch, KVCache
from refengine.config import ModelConfig
from refengine.cuda.decode.buffers import Buffer
from refengine.cuda.decode.ops import Angles, StepArrays, StepOps
from refengine.cuda.decode.values import Product, Value
from refengine.cuda.kernels import attention, matmul
from refengine.cuda.kernels.attention import BatchLayout
from refengine.cuda.ops import KernelOps, layout_of
from refengine.cuda.upload import together
from refengine.errors import KernelError
from refengine.ops.decode import no_trace

Decode = Callable[..., Any]


class Pooled:
    """Buffers from the pool of a forward pass, to which they return when nothing refers to them any more."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        return Buffer(self._xp.empty(shape, dtype), 0)

    def use(self, buffer: Buffer) -> None:
        """Does nothing: a buffer is in use as long as something refers to it."""

    def launched(self) -> None:
        """Does nothing, likewise."""


class PromptOps(StepOps):
    """The operations of one pass over n rows. wanted: the rows whose logits are wanted, on the host."""

    def __init__(
        self, ops: KernelOps, arrays: StepArrays, n: int, layout: BatchLayout, wanted: Sequence[int] | np.ndarray
    ) -> None:
        super().__init__(ops.kernels, arrays, Pooled(ops.xp), n)
        self._xp, self._layout, self._wanted = ops.xp, layout, np.asarray(wanted)

    def rows(self, x: Value) -> Value:
        n, array = len(self._wanted), self.array(x)
        first = int(self._wanted[0]) if n else 0
        if np.array_equal(self._wanted, np.arange(first, first + n)):
            part = array[first : first + n]
        else:
            part = array[self._xp.asarray(self._wanted)]
        return Value(n, x.width, Buffer(part, 0))

    def _attend(self, il: int, q: Array, options: dict[str, Any]) -> Value:
        n, n_head, head_dim = q.shape
        k, v = self._a.k[il], self._a.v[il]
        splits = attention.splits_of(self._layout, k.values.shape[2], options["window"], None)
        partial = self._b.new((n, n_head, splits[1], head_dim + 2), np.float32).array if splits[2] else None
        y = self._new(n, n_head * head_dim)
        self._launch(attention.attention, q, k, v, self._layout, y.array, splits=splits, partial=partial, **options)
        return Value(n, n_head * head_dim, y)

    def _group_size(self, product: Product) -> int:
        assert product.w is not None
        return matmul.group_size(product.w, product.n_rows)


class PromptPass:
    """Runs forward passes over prompts for the sequences of one cache.

    n_positions: the maximum length of a sequence. angles: as in `StepArrays`.
    """

    def __init__(
        self,
        ops: KernelOps,
        cfg: ModelConfig,
        decode: Decode,
        weights: Any,
        kv: KVCache,
        n_positions: int,
        angles: Callable[[int, Any, Array | None], Angles],
    ) -> None:
        self._ops, self._cfg, self._decode, self._weights, self._kv = ops, cfg, decode, weights, kv
        self._n_positions, self._angles = n_positions, angles

    def run(self, batch: Batch) -> Array:
        """The logits of the rows that `batch` asks for, (n_out, n_vocab) on the device. Fills the cache at its slots.

        Raises KernelError if ids, positions or blocks are out of range.
        """
        self._check(batch)
        n, kv = len(batch.ids), self._kv
        with np.errstate(all="ignore"), self._ops.workspace():
            tables = np.zeros((n, max(len(span.block_table) for span in batch.spans)), np.int32)
            for span in batch.spans:
                tables[span.start : span.stop, : len(span.block_table)] = span.block_table
            layout = layout_of(batch, self._cfg.n_head // self._cfg.n_head_kv)
            arrays = together(self._ops.xp, [batch.ids, batch.positions, tables, *layout.arrays])
            ids, positions, on_device, *of_layout = arrays
            step = StepArrays(
                ids,
                positions,
                on_device,
                kv.k,
                kv.v,
                n_ctx=kv.n_ctx,
                n_positions=self._n_positions,
                angles=self._angles,
            )
            ops = PromptOps(self._ops, step, n, layout.on_device(of_layout), batch.rows)
            logits = self._decode(self._cfg, self._weights, ops, no_trace)
            if not len(batch.rows):
                return self._ops.xp.empty((0, self._cfg.n_vocab), np.float32)
            return ops.array(logits)

    def _check(self, batch: Batch) -> None:
        """A kernel would read or write out of bounds otherwise (W-1431)."""
        blocks = np.concatenate([span.block_table for span in batch.spans])
        limits = {"ids": (batch.ids, self._cfg.n_vocab), "blocks": (blocks, self._kv.n_blocks)}
        for name, (values, limit) in (limits | {"positions": (batch.positions, self._n_positions)}).items():
            if not 0 <= values.min() <= values.max() < limit:
                raise KernelError(f"prompt: {name} {values.min()} to {values.max()}, allowed 0 to {limit - 1}")
