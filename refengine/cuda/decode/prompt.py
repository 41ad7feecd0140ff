"""A pass over prompts with a model's `decode()`: the fused operations of a decode step, for any number of rows.

A row is a token of a sequence, with its position and its sequence's blocks of the cache; a sequence may have several.
So a prompt takes about as few launches as a step, and has the bits of `forward()`. What differs from a step is the
attention, of several rows to the same positions, and larger groups of rows that use the same expert.

The launches for a number of rows are prepared once, as a program, which Python then only has to run. Numbers of rows
are rounded up (`bucket_of`); the rows in excess have no sequence, as in a step. Only attention is launched anew each
time, because its grid depends on the sequences. Nothing waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cache.paged import Batch, KVCache
from refengine.config import ModelConfig
from refengine.cuda.decode.buffers import Buffers, Placed, Plan, Recorder, shaped
from refengine.cuda.decode.ops import Angles, StepArrays, StepOps
from refengine.cuda.decode.state import NO_ROW
from refengine.cuda.decode.values import Heads, NoFusedStep, Product, Value
from refengine.cuda.kernels import attention, embedding, matmul, rope
from refengine.cuda.kernels.attention import BLOCK_ROWS, BatchLayout, PagedRows
from refengine.cuda.memory import Arena, DeviceMemory, aligned
from refengine.cuda.ops import KernelOps, layout_of
from refengine.cuda.runtime.launch import Kernels, NoLaunches, Program
from refengine.cuda.upload import together
from refengine.errors import KernelError
from refengine.ops.decode import no_trace

Decode = Callable[..., Any]
MOST_PROGRAMS = 64  # programs that are kept; one takes about half a megabyte of host memory


def bucket_of(n: int) -> int:
    """The number of rows for which n rows are computed: 8, 16, 32, or a multiple of 64; from 1024 on, of n / 8 or less.

    The rows in excess cost little, because products compute 8 or 64 rows together.
    """
    if n <= 32:
        return next(size for size in (8, 16, 32) if n <= size)
    step = max(64, 1 << (n.bit_length() - 4))
    return -(-n // step) * step


def most_wanted(n: int) -> int:
    """The number of logit rows that are computed if n are wanted: none, or a power of two."""
    return 1 << (n - 1).bit_length() if n else 0


def split_bytes(cfg: ModelConfig, n: int, n_positions: int) -> int:
    """The bytes that attention of n rows needs at most for splits with blocks of their own."""
    n_splits = -(-n_positions // attention.SPLIT)
    if n_splits < 2:
        return 0
    return min(attention.PARTIAL_BYTES, attention.split_bytes(n, cfg.n_head, cfg.head_dim, n_splits))


@dataclass(frozen=True)
class Inputs:
    """The arrays, at fixed addresses, that a pass is given: ids, positions, wanted (n,), tables (n, n_blocks); int32.

    wanted: the rows whose logits are wanted. Unused rows have the position NO_ROW. routed: as in `StepArrays`.
    """

    ids: Array
    positions: Array
    wanted: Array
    tables: Array
    routed: Array

    @staticmethod
    def of(take: Callable[[tuple[int, ...], Any], Array], n: int, n_blocks: int) -> Inputs:
        """The inputs of up to n rows, allocated by `take(shape, dtype)`."""
        ids, positions, wanted = (take((n,), np.int32) for _ in range(3))
        return Inputs(ids, positions, wanted, take((n, n_blocks), np.int32), take((1,), np.int32))

    @staticmethod
    def n_bytes(n: int, n_blocks: int) -> int:
        """The bytes that `of` allocates in an arena."""
        return 3 * aligned(4 * n) + aligned(4 * n * n_blocks) + 4


class PromptOps(StepOps):
    """The operations of a pass over n rows, of which the logits of n_wanted are wanted.

    layout: the sequences' rows and blocks, for the next run of the attention's launches. split_space: gives float32
    work space of a shape to them.
    """

    def __init__(
        self,
        ops: KernelOps,
        kernels: Kernels,
        arrays: StepArrays,
        buffers: Buffers,
        n: int,
        wanted: Array,
        split_space: Callable[[tuple[int, ...]], Array],
    ) -> None:
        super().__init__(kernels, arrays, buffers, n)
        self._ops, self._wanted, self._split_space = ops, wanted, split_space
        self.layout: BatchLayout | None = None

    def rows(self, x: Value) -> Value:
        (array,) = self._arrays(x)
        y = self._new(len(self._wanted), x.width)
        self._launch(embedding.take_rows, array, self._wanted, y.array)
        return Value(y.array.shape[0], x.width, y)

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
        head_dim = q.x.width // n_head
        projections, rotation, of_heads = self._projected(q, k, v)
        rotated = self._b.new((n, n_head, head_dim), np.float32)
        given = (projections, rotation, a.positions[:n], a.tables[:n], rotated.array, a.k[il], a.v[il])
        self._launch(rope.rope_append, *given, **of_heads)
        self._use(rotated)
        y = self._new(n, n_head * head_dim)
        options = {"scale": scale, "window": window, "sinks": sinks}
        self._kernels.call(partial(self._attend_now, rotated.array, a.k[il], a.v[il], y.array, options))
        self._b.launched()
        return Value(n, n_head * head_dim, y)

    def _attend_now(self, q: Array, k: Any, v: Any, y: Array, options: dict[str, Any]) -> None:
        assert self.layout is not None
        n, n_head, head_dim = q.shape
        splits = attention.splits_of(self.layout, q.shape, k.values.shape[1], options["window"], None)
        partial = self._split_space((n, n_head, splits[1], head_dim + 2)) if splits[2] else None
        attention.attention(self._ops.kernels, q, k, v, self.layout, y, splits=splits, partial=partial, **options)

    def _group_size(self, product: Product) -> int:
        assert product.w is not None
        return matmul.group_size(product.w, product.n_rows)


class PromptPass:
    """Runs forward passes over prompts for the sequences of one cache. All of them must be on the same stream.

    n_positions: the maximum length of a sequence. angles: as in `StepArrays`. prepared: as for `Program`.
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
        *,
        prepared: bool = True,
    ) -> None:
        self._ops, self._cfg, self._decode, self._weights, self._kv = ops, cfg, decode, weights, kv
        self._n_positions, self._angles, self._prepared = n_positions, angles, prepared
        self._n_blocks = KVCache.blocks_for(n_positions, kv.block_size)
        self._inputs: Inputs | None = None
        self._inputs_arena: Arena | None = None  # has the inputs, and is accounted as long as it is kept
        self._arena: Arena | None = None  # the buffers of all programs, which do not run at the same time
        self._splits: Arena | None = None  # what attention adds up before splits are folded
        self._programs: OrderedDict[tuple[int, int], tuple[Program, PromptOps, Array | None]] = OrderedDict()

    def prepare(self, n: int, n_wanted: int) -> None:
        """Allocate what passes of n rows need whose logits are wanted for up to n_wanted rows, and prepare them; also
        prepare passes of fewer rows, up to 512, for one row of logits.
        """
        smaller = {bucket_of(size) for size in (1, 16, 32, *range(64, min(n, 512), 64))}
        with self._ops.workspace():
            self._splits = self._ops.memory.arena("workspace", split_bytes(self._cfg, bucket_of(n), self._n_positions))
            self._program(bucket_of(n), most_wanted(n_wanted))
            for size in sorted({bucket_of(n), *smaller}, reverse=True):
                if size <= bucket_of(n):
                    self._program(size, 1)

    def most_inputs(self, n: int, n_sequences: int) -> Array:
        """An array as large as what any pass of n rows of up to n_sequences sequences copies to the device."""
        width, tiles = self._n_blocks, n * self._cfg.n_head // BLOCK_ROWS + n_sequences  # at most
        # ids, positions, wanted rows, tables of rows; tables, spans and tiles of the layout
        arrays = (n, n, n, n * width, n_sequences * width, 4 * n_sequences, 2 * tiles)
        return self._ops.xp.empty(sum(aligned(4 * size) for size in arrays), np.uint8)

    def run(self, batch: Batch) -> Array:
        """The logits of the rows that `batch` asks for, (n_out, n_vocab) on the device, valid until the next run.

        Fills the cache at the batch's slots. Raises KernelError if ids, positions or blocks are out of range,
        DeviceError if the buffers do not fit.
        """
        self._check(batch)
        n, n_out = len(batch.ids), len(batch.rows)
        with np.errstate(all="ignore"), self._ops.workspace():
            size = bucket_of(n)
            program, ops, logits = self._program(size, most_wanted(n_out))
            assert self._inputs is not None
            ids, wanted = np.zeros(size, np.int32), np.zeros(most_wanted(n_out), np.int32)
            positions = np.full(size, NO_ROW, np.int32)
            ids[:n], positions[:n], wanted[:n_out] = batch.ids, batch.positions, batch.rows
            width = max(len(span.block_table) for span in batch.spans)
            tables = np.zeros((n, width), np.int32)
            for span in batch.spans:
                tables[span.start : span.stop, : len(span.block_table)] = span.block_table
            layout = layout_of(batch, self._cfg.n_head // self._cfg.n_head_kv)
            given = together(self._ops.xp, [ids, positions, wanted, tables, *layout.arrays])
            self._inputs.ids[:size], self._inputs.positions[:size] = given[:2]
            self._inputs.wanted[: len(wanted)], self._inputs.tables[:n, :width] = given[2:4]
            ops.layout = layout.on_device(given[4:])
            program.run()
            return self._ops.xp.empty((0, self._cfg.n_vocab), np.float32) if logits is None else logits[:n_out]

    def _program(self, n: int, n_wanted: int) -> tuple[Program, PromptOps, Array | None]:
        """The launches for n rows and n_wanted rows of logits, the operations that made them, and the logits' array."""
        found = self._programs.get((n, n_wanted))
        if found is not None:
            self._programs.move_to_end((n, n_wanted))
            return found
        inputs = self._inputs_for(max(n, n_wanted))
        plan = self._plan(inputs, n, n_wanted)
        if self._arena is None or self._arena.n_bytes < plan.n_bytes:
            self._programs.clear()
            self._arena = None  # the old buffers are freed before the new ones are allocated
            self._arena = self._ops.memory.arena("workspace", plan.n_bytes)
        program = Program(self._ops.kernels, self._prepared)
        ops, logits = self._launched(program, Placed(self._arena, plan.offsets), inputs, n, n_wanted)
        self._programs[n, n_wanted] = program, ops, logits
        if len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return program, ops, logits

    def _launched(
        self, kernels: Kernels, buffers: Buffers, inputs: Inputs, n: int, n_wanted: int
    ) -> tuple[PromptOps, Array | None]:
        """Give `kernels` all launches of a pass. Returns the operations, and the array of the logits."""
        kv, rows = self._kv, (inputs.ids[:n], inputs.positions[:n], inputs.tables[:n])
        arrays = StepArrays(*rows, None, inputs.routed, kv.k, kv.v, kv.n_ctx, self._angles)
        wanted = inputs.wanted[:n_wanted]
        ops = PromptOps(self._ops, kernels, arrays, buffers, n, wanted, self._split_space)
        logits = self._decode(self._cfg, self._weights, ops, no_trace)
        return ops, ops.array(logits) if n_wanted else None

    def _split_space(self, shape: tuple[int, ...]) -> Array:
        """Work space that is free again after the next launches; from the pool if there is none of that size."""
        if self._splits is None or 4 * prod(shape) > self._splits.n_bytes:
            return self._ops.xp.empty(shape, np.float32)
        return self._splits.view(0, shape, np.float32)

    def _plan(self, inputs: Inputs, n: int, n_wanted: int) -> Plan:
        """The places of a pass's buffers. inputs: only their shapes are used."""
        recorder = Recorder()
        self._launched(NoLaunches(self._ops.kernels.place), recorder, inputs, n, n_wanted)
        return recorder.plan()

    def _inputs_for(self, n: int) -> Inputs:
        """The inputs of at least n rows."""
        if self._inputs is None or len(self._inputs.ids) < n:
            self._programs.clear()
            arena = self._ops.memory.arena("workspace", Inputs.n_bytes(n, self._n_blocks))
            self._inputs, self._inputs_arena = Inputs.of(arena.take, n, self._n_blocks), arena
        return self._inputs

    @staticmethod
    def planned_bytes(
        cfg: ModelConfig,
        decode: Decode | None,
        weights: Any,
        place: str,
        n: int,
        n_wanted: int,
        *,
        n_ctx: int,
        n_positions: int,
        block_size: int,
    ) -> int:
        """The bytes that `prepare(n, n_wanted)` allocates, found without a device. Raises NoFusedStep.

        weights: the model's weights, of which only names, types and shapes are used. n_positions: the maximum length
        of a sequence.
        """
        if decode is None:
            raise NoFusedStep(f"the model file of {cfg.arch} has no decode()")

        def cache(n: int, shape: tuple[int, ...]) -> list[PagedRows]:
            return [PagedRows.of(shaped, shape)] * n

        def angles(number: int, constants: Any, freq_factors: Array | None) -> Angles:
            table = shaped((n_positions, constants.n_rot // 2), np.float32)
            return table, table

        n_blocks, size = KVCache.blocks_for(n_positions, block_size), bucket_of(n)
        kv = KVCache(
            cache, cfg.n_layer, cfg.n_head_kv, cfg.head_dim, n_ctx=n_ctx, n_blocks=n_blocks, block_size=block_size
        )
        ops = KernelOps(np, NoLaunches(place), DeviceMemory(np))
        prompts = PromptPass(ops, cfg, decode, weights, kv, n_positions, angles)
        n_wanted = most_wanted(n_wanted)
        most = max(size, n_wanted)
        plan = prompts._plan(Inputs.of(shaped, most, n_blocks), size, n_wanted)
        return Inputs.n_bytes(most, n_blocks) + plan.n_bytes + split_bytes(cfg, size, n_positions)

    def _check(self, batch: Batch) -> None:
        """A kernel would read or write out of bounds otherwise (W-1431)."""
        limits = {
            "ids": (batch.ids, self._cfg.n_vocab),
            "positions": (batch.positions, self._n_positions),
            "blocks": (np.concatenate([span.block_table for span in batch.spans]), self._kv.n_blocks),
            "rows": (batch.rows, len(batch.ids)),
        }
        for name, (values, limit) in limits.items():
            if values.size and not 0 <= values.min() <= values.max() < limit:
                raise KernelError(f"prompt: {name} {values.min()} to {values.max()}, allowed 0 to {limit - 1}")
