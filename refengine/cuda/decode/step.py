"""The decode step: one new token for each of up to `max_batch` sequences, from the fed ids to the sampled ids.

Everything runs on the device: a model's `decode()` in few kernels per layer (`cuda.decode.ops`), with a CUDA graph for
each bucket of rows. The results have the same bits as those of `model.step` and `sampling.sample_rows`. The host
uploads changed state, launches, and reads the ids. Because a step also advances the state on the device, the host can
launch the next step before it reads the ids of this one; the device then never waits for the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cache.paged import BLOCK_SIZE, KVCache
from refengine.config import ModelConfig
from refengine.cuda.decode.buffers import Placed, Plan, Recorder, shaped
from refengine.cuda.decode.ops import Angles, StepArrays, StepOps
from refengine.cuda.decode.state import DecodeRow, DecodeState
from refengine.cuda.decode.values import NoFusedStep
from refengine.cuda.kernels.attention import HEAD_DIMS, TILE, PagedRows
from refengine.cuda.kernels.attention_step import counters_of
from refengine.cuda.kernels.few_rows import FEW_ROWS
from refengine.cuda.kernels.moe import MOST_USED
from refengine.cuda.kernels.sampling import WORK_SPACE, Sampler
from refengine.cuda.memory import Arena, aligned
from refengine.cuda.ops import KernelOps
from refengine.cuda.runtime.compile import compile_files, missing
from refengine.cuda.runtime.cubin_cache import cache_folder, can_store
from refengine.cuda.runtime.launch import ForPlans, Kernels, Needed, NoLaunches
from refengine.cuda.runtime.nvrtc import architecture
from refengine.cuda.runtime.source import Part
from refengine.errors import KernelError
from refengine.ops.decode import DecodeOps, DecodeTrace, Value, no_trace

Decode = Callable[[ModelConfig, Any, DecodeOps, DecodeTrace], Value]  # `decode()` of a model file
Shapes = dict[str, tuple[tuple[int, ...], Any]]

log = logging.getLogger(__name__)

NOT_STORED = (
    "{n} kernels of this model are not in {folder}, which cannot be written; set REFENGINE_CACHE to a folder that can, "
    "or put them there with refengine compile --model"
)
ANGLES_AT_ONCE = 4096  # how many positions' angles are computed together on the host

__all__ = ["Decode", "DecodeRow", "DecodeStep", "NoFusedStep", "StepPlan", "buckets_for"]


def buckets_for(max_batch: int) -> tuple[int, ...]:
    """The numbers of rows for which kernels are launched: powers of two below max_batch, and max_batch."""
    return (*(1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch), max_batch)


@dataclass(frozen=True)
class StepPlan:
    """The device memory that a step needs: buffers for each bucket of rows, angles of positions, and the rows' state.

    offsets: of the buffers, by bucket. n_bytes: the size of the largest bucket's buffers. angles: the shape
    (n_positions, n_rot / 2) of each table of cos and sin. state: the arrays of rows and sampling, by name.
    """

    offsets: dict[int, tuple[int, ...]]
    n_bytes: int
    angles: tuple[tuple[int, int], ...]
    state: Shapes

    @property
    def total_bytes(self) -> int:
        """The total bytes in an arena."""
        tables = sum(2 * aligned(4 * n * half) for n, half in self.angles)
        shapes = self.state.values()
        state = sum(aligned(int(np.prod(s, dtype=np.int64)) * np.dtype(t).itemsize) for s, t in shapes)
        return aligned(self.n_bytes) + tables + state

    @staticmethod
    def of(
        decode: Decode | None,
        cfg: ModelConfig,
        weights: Any,
        kernels: NoLaunches,
        *,
        max_batch: int,
        n_ctx: int,
        n_positions: int,
        block_size: int,
    ) -> StepPlan:
        """Plan a step without a device. Raises NoFusedStep, with the reason, if the model has no fused step.

        weights: the model's weights, of which only names, types and shapes are used. n_positions: the maximum length of
        a sequence, the smaller of the context length and the cache's size. kernels: are given the launches.
        """
        if decode is None:
            raise NoFusedStep(f"the model file of {cfg.arch} has no decode()")
        if cfg.head_dim % 8 or cfg.head_dim > HEAD_DIMS[-1]:
            raise NoFusedStep(f"heads of {cfg.head_dim} elements; kernels take multiples of 8 up to {HEAD_DIMS[-1]}")
        if cfg.n_expert_used > MOST_USED:
            raise NoFusedStep(f"{cfg.n_expert_used} experts a token; kernels take up to {MOST_USED}")
        n_blocks = -(-n_positions // block_size)
        shape = (n_blocks, block_size, cfg.n_head_kv, cfg.head_dim)
        cache = [PagedRows.of(shaped, shape)] * cfg.n_layer
        rows: Shapes = {
            "ids": ((max_batch,), np.int32),
            "positions": ((max_batch,), np.int32),
            "tables": ((max_batch, n_blocks), np.int32),
            "arrived": ((counters_of(max_batch, cfg.n_head),), np.int32),
            "routed": ((1,), np.int32),
        }
        angles: dict[int, tuple[int, int]] = {}

        def note_angles(number: int, constants: Any, freq_factors: Array | None) -> Angles:
            angles[number] = (n_positions, constants.n_rot // 2)
            table = shaped(angles[number], np.float32)
            return table, table

        on_device = {name: shaped(shape, dtype) for name, (shape, dtype) in rows.items()}
        arrays = StepArrays(**on_device, k=cache, v=cache, n_ctx=n_ctx, angles=note_angles)
        plans: dict[int, Plan] = {}
        for bucket in buckets_for(max_batch):
            recorder = Recorder()
            ops = StepOps(kernels, arrays, recorder, bucket)
            ops.array(decode(cfg, weights, ops, no_trace))
            plans[bucket] = recorder.plan()
        sampling = Sampler(kernels, cfg.n_vocab, n_positions + 1).arrays(max_batch)
        offsets = {bucket: plan.offsets for bucket, plan in plans.items()}
        most = max(plan.n_bytes for plan in plans.values())
        return StepPlan(offsets, most, tuple(angles[i] for i in sorted(angles)), rows | sampling)


def kernels_of_steps(
    decode: Decode | None, cfg: ModelConfig, weights: Any, kernels: Kernels, max_batch: int, n_positions: int
) -> list[Part]:
    """The kernels for one plan that steps of up to max_batch rows have, on a device like that of `kernels`.

    weights: of these, only names, types and shapes are used. Raises NoFusedStep if the model has no fused step.
    """
    needed = Needed(kernels)
    sizes = {"n_ctx": cfg.n_ctx_train, "n_positions": n_positions, "block_size": BLOCK_SIZE}
    most = min(max_batch, FEW_ROWS)
    StepPlan.of(decode, cfg, weights, needed, max_batch=most, **sizes)
    return needed.parts


class _Copy:
    """A copy on the host of a step's result, for up to `n` rows. On a GPU it is in page-locked memory, so that the host
    need not wait where the copy is queued."""

    def __init__(self, xp: Any, n: int) -> None:
        self._done: Any = None
        self._drawn = np.zeros((n, 3), np.int32)
        if xp is not np:
            # Not from CuPy's pool, which would lend it to others while a copy is still queued.
            pinned = xp.cuda.PinnedMemoryPointer(xp.cuda.PinnedMemory(self._drawn.nbytes), 0)
            self._drawn = np.frombuffer(pinned, np.int32, 3 * n).reshape(n, 3)
            self._done = xp.cuda.Event(disable_timing=True)

    def queue(self, drawn: Any) -> None:
        """Copy the result (n, 3) after all that was launched before."""
        if self._done is None:
            self._drawn[...] = drawn
        else:
            drawn.get(out=self._drawn, blocking=False)
            self._done.record()

    def wait(self, n: int) -> np.ndarray:
        """The result of the first n rows, when it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._drawn[:n].copy()


@dataclass(frozen=True)
class _Launched:
    """A step of `n` rows that was launched, and the copy of its result."""

    n: int
    bucket: int
    copy: _Copy


class DecodeStep:
    """Runs decode steps for the sequences of one cache. buckets: the numbers of rows for which kernels are launched;
    n_positions: the maximum length of a sequence.

    The constructor allocates all memory, with the purpose `workspace`. It raises DeviceError if the memory does not
    fit, NoFusedStep if the model has no fused step. Other work on the device must be on the current stream of `run`, or
    must be waited for: a step launched ahead may still run when `run` has returned.
    """

    def __init__(
        self,
        ops: KernelOps,
        cfg: ModelConfig,
        decode: Decode | None,
        weights: Any,
        kv: KVCache,
        *,
        max_batch: int,
        graphs: bool = True,
    ) -> None:
        if kv.block_size % TILE:
            raise KernelError(f"decode: blocks of {kv.block_size} positions are not a multiple of {TILE}")
        self.n_positions = min(kv.n_ctx, kv.n_blocks * kv.block_size)
        sizes = {"n_ctx": kv.n_ctx, "n_positions": self.n_positions, "block_size": kv.block_size}
        if max_batch < 1:
            raise KernelError(f"decode: max_batch is {max_batch}, expected at least 1")
        plan = StepPlan.of(decode, cfg, weights, NoLaunches(ops.kernels.place), max_batch=max_batch, **sizes)
        assert decode is not None
        self._ops, self._cfg, self._decode, self._weights = ops, cfg, decode, weights
        self._plan, self.buckets = plan, buckets_for(max_batch)
        self._with_graphs = graphs and ops.xp is not np
        self._for_plans: Kernels = ForPlans(ops.kernels)  # for steps of few rows, if they are captured as graphs
        self._graphs: dict[int, Any] = {}
        self._logits: dict[int, Array] = {}
        # One is still read while the step launched ahead writes the other.
        self._copies = cycle([_Copy(ops.xp, max_batch), _Copy(ops.xp, max_batch)])
        self._ahead: _Launched | None = None  # the step that was launched ahead
        self.n_ahead = 0  # number of steps so far whose rows were asked for after they had been launched, for tests
        with ops.workspace():
            self._arena: Arena = ops.memory.arena("workspace", plan.total_bytes)
            self._arena.take((plan.n_bytes,), np.uint8)  # the memory of the buffers
            self._tables = [tuple(self._arena.take(shape, np.float32) for _ in range(2)) for shape in plan.angles]
            self._b = {name: self._arena.take(shape, dtype) for name, (shape, dtype) in plan.state.items()}
        self._filled: set[int] = set()
        # The counters arrived and routed are zeros, as everything in a new arena.
        rows = {name: self._b[name] for name in ("ids", "positions", "tables", "arrived", "routed")}
        self._arrays = StepArrays(**rows, k=kv.k, v=kv.v, n_ctx=kv.n_ctx, angles=self.angles)
        self._sampler = Sampler(ops.kernels, cfg.n_vocab, self.n_positions + 1)
        self.state = DecodeState(ops.xp, self._b, cfg.n_vocab, self.n_positions, kv.block_size)

    @property
    def logits_space(self) -> Array:
        """The logits of the largest bucket, (max_batch, n_vocab), which any step overwrites. Not before `warm_up`."""
        return self._logits[self.buckets[-1]]

    @property
    def sampling_space(self) -> dict[str, Array]:
        """Work space for sampling up to max_batch rows, which nothing uses between two steps on the same stream."""
        return {name: self._b[name] for name in WORK_SPACE}

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the kernels of a step, and capture a graph for every bucket. Does not affect any sequence.

        progress: called with (kernels compiled, total), if any are not in the cache.
        """
        self.wait()
        self.state.update([])
        if self._with_graphs:
            self._compile(progress)
        for bucket in self.buckets:
            self._launch(bucket, None)
            if self._with_graphs:
                self._graphs[bucket] = self._captured(bucket)

    def run(
        self, rows: Sequence[DecodeRow], trace: DecodeTrace | None = None, ahead: bool = False
    ) -> tuple[np.ndarray, Array | None]:
        """Feed every row's token and sample the next one.

        Returns the argument of `sampling.checked_tokens`, (n, 3) int32 on the host, and the logits (n, n_vocab) on the
        device, which are valid until the next run; None if another step has overwritten them or has had more rows.
        trace: gets the results of layers; kernels are then launched without a graph.
        ahead: launch the next step of the same rows before the result of this one is read. Block tables must include
        its positions. The next run uses its result if its rows are among those, with the sampled tokens and unchanged
        blocks, and with no other work on these blocks before it; otherwise nothing remains of that step.
        Raises KernelError for invalid rows.
        """
        n = len(rows)
        if not 1 <= n <= self.buckets[-1]:
            raise KernelError(f"decode: {n} rows, allowed 1 to {self.buckets[-1]}")
        try:
            places = None if self._ahead is None or trace is not None else self.state.places(rows)
            if self._ahead is None or places is None:
                self.wait()
                self.state.update(rows)
                step, places = self._launched(n, trace), list(range(n))
            else:
                step, self._ahead = self._ahead, None
                self.n_ahead += 1
            if ahead and step.n == n:
                self.state.reach_next(rows)
                self._ahead = self._launched(n, None)
            drawn = step.copy.wait(step.n)
            self.state.advanced(drawn)
        except BaseException:
            self._ahead = None
            self.state.forget()
            raise
        if step.n > n:  # some rows have ended
            return drawn[places], None
        return drawn, None if self._ahead else self._logits[step.bucket][:n]

    def wait(self) -> None:
        """Wait for the step that was launched ahead, if there is one. Its result is dropped."""
        step, self._ahead = self._ahead, None
        if step is None:
            return
        try:
            self.state.advanced(step.copy.wait(step.n))
        except BaseException:
            self.state.forget()
            raise

    def replay(self, n: int) -> Callable[[], None]:
        """A function that launches the graph of a step of n rows once more, for measurements: whatever the rows are,
        they advance by a position, and what is sampled is lost. Raises KernelError if no graph was captured.
        """
        graph = self._graphs.get(next(b for b in self.buckets if b >= n))
        if graph is None:
            raise KernelError("decode: there is no graph to replay; graphs are off, or the step was not warmed up")
        launch: Callable[[], None] = graph.launch
        return launch

    def _launched(self, n: int, trace: DecodeTrace | None) -> _Launched:
        """Launch a step of the first n rows, and the copy of its result."""
        bucket = next(b for b in self.buckets if b >= n)
        graph = self._graphs.get(bucket) if trace is None else None
        if graph is None:
            self._launch(bucket, trace)
        else:
            graph.launch()
        copy = next(self._copies)
        copy.queue(self._b["drawn"])
        return _Launched(n, bucket, copy)

    def _captured(self, bucket: int) -> Any:
        """Capture the launches of a step as a graph. They have run before, so nothing is compiled or allocated now."""
        xp = self._ops.xp
        xp.cuda.get_current_stream().synchronize()
        stream = xp.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                self._launch(bucket, None)
            finally:
                graph = stream.end_capture()
        return graph

    def _launch(self, bucket: int, trace: DecodeTrace | None) -> None:
        """Launch all kernels of a step for `bucket` rows."""
        # A trace asks for rows that a step otherwise need not compute, so that its plans are others.
        kernels = self._kernels_of(bucket) if trace is None else self._ops.kernels
        step = StepOps(kernels, self._arrays, Placed(self._arena, self._plan.offsets[bucket]), bucket)

        def traced(name: str, il: int, x: Value) -> None:
            if trace is not None:
                trace(name, il, step.array(x))

        with np.errstate(all="ignore"):
            logits = step.array(self._decode(self._cfg, self._weights, step, traced))
        self._logits[bucket] = logits
        self._sampler.draw(bucket, logits, self._b)

    def _kernels_of(self, bucket: int) -> Kernels:
        """The kernels for steps of `bucket` rows."""
        return self._for_plans if self._with_graphs and bucket <= FEW_ROWS else self._ops.kernels

    def _compile(self, progress: Callable[[int, int], None] | None) -> None:
        """Compile the kernels that are for one plan, in parallel. If they are not in the cache, and it cannot store
        them, steps use the kernels for all plans, which are slower.
        """
        arch, given = architecture(self._ops.xp), (self._decode, self._cfg, self._weights, self._ops.kernels)
        parts = missing(arch, kernels_of_steps(*given, self.buckets[-1], self.n_positions))
        if parts and not can_store():
            log.warning("decode steps use slower kernels: %s", NOT_STORED.format(n=len(parts), folder=cache_folder()))
            self._for_plans = self._ops.kernels
        else:
            compile_files(arch, parts, progress)

    def angles(self, number: int, constants: Any, freq_factors: Array | None) -> Angles:
        """The table for `decode()`'s request with this number, filled at the first request."""
        cos, sin = self._tables[number]
        if number not in self._filled:
            for start in range(0, self.n_positions, ANGLES_AT_ONCE):
                positions = np.arange(start, min(start + ANGLES_AT_ONCE, self.n_positions))
                some = self._ops.rope_angles(positions, constants, freq_factors)
                for table, part in zip((cos, sin), some, strict=True):
                    table[start : start + len(positions)] = part[:, 0]
            if self._ops.xp is not np:  # attention reads the tables before the kernels in front of it have ended
                self._ops.xp.cuda.get_current_stream().synchronize()
            self._filled.add(number)
        return cos, sin
