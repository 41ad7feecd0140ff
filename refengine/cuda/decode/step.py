"""The fused decode step: one new token for each of up to `max_batch` sequences, from the ids fed to the ids drawn.

All on the device, few kernels a layer (`decode_models`), a CUDA graph for each bucket of rows, and bit for bit what
`model.step` and `sampling.sample_rows` compute. The host uploads what changed, launches, and reads the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refengine.cache.paged import KVCache
from refengine.config import ModelConfig
from refengine.cuda.decode.buffers import layout_for
from refengine.cuda.decode.models import BY_ARCHITECTURE, Trace, freq_factors, no_trace
from refengine.cuda.decode.ops import FusedOps
from refengine.cuda.decode.state import DecodeRow, DecodeState
from refengine.cuda.layout import TILE_ROWS
from refengine.cuda.memory import Layout
from refengine.cuda.ops import HEAD_DIMS, TILE, KernelOps
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.sampling import StepSampler
from refengine.errors import KernelError

Array = Any

__all__ = ["DecodeRow", "DecodeStep"]


class DecodeStep:
    """Steps over the sequences of one cache. buckets: the numbers of rows that kernels are launched for;
    n_positions: how long a sequence may be.

    Buffers are taken here, once, of the purpose `workspace`. Raises DeviceError where they do not fit. What else runs
    on the device must be on the stream that is current when `run` is called, or be waited for.
    """

    def __init__(
        self, ops: KernelOps, cfg: ModelConfig, weights: Any, kv: KVCache, *, max_batch: int, graphs: bool = True
    ) -> None:
        if not self.supports(cfg) or max_batch < 1:
            raise KernelError(f"no fused step for {max_batch} sequences of {cfg.arch} with heads of {cfg.head_dim}")
        if kv.block_size % TILE:
            raise KernelError(f"decode: blocks of {kv.block_size} positions are no multiple of {TILE}")
        self._ops, self._cfg, self._weights = ops, cfg, weights
        self._forward = BY_ARCHITECTURE[cfg.arch]
        self._with_graphs = graphs and ops.xp is not np
        self._graphs: dict[int, Any] = {}
        self.buckets = (*(1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch), max_batch)
        with ops.workspace():
            self._fused = FusedOps(ops, cfg, kv, max_batch, freq_factors(cfg, weights, kv))
        self.n_positions = self._fused.n_positions
        self._sampler = StepSampler(ops.kernels, cfg.n_vocab, self.n_positions + 1)
        self._sampler.want(layout := Layout(), max_batch)
        self._arena = ops.memory.arena("workspace", layout.n_bytes)
        self._b = layout.taken(self._arena)
        fused = self._fused
        self._b |= {"ids": fused.ids, "positions": fused.positions, "tables": fused.tables}
        self.state = DecodeState(ops.xp, self._b, cfg.n_vocab, fused.n_positions, kv.block_size)

    @staticmethod
    def supports(cfg: ModelConfig) -> bool:
        """Whether there is a fused step for a model of this shape."""
        return (
            cfg.arch in BY_ARCHITECTURE
            and cfg.head_dim % 8 == 0
            and cfg.head_dim <= HEAD_DIMS[-1]
            and cfg.n_expert_used <= 32
            and (cfg.arch != "phi3" or cfg.n_ff % TILE_ROWS == 0)  # gate and up are halves of one matrix
        )

    @staticmethod
    def bytes_for(place: str, cfg: ModelConfig, *, max_batch: int, n_positions: int, block_size: int) -> int:
        """Device memory that a step takes; n_positions: the smaller of the context and what the whole cache holds.

        place: `cuda` or `host`; no device is asked.
        """
        of_sampling = Layout()
        StepSampler(Kernels(place), cfg.n_vocab, n_positions + 1).want(of_sampling, max_batch)
        return layout_for(cfg, max_batch, n_positions, block_size).n_bytes + of_sampling.n_bytes

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile what a step needs, and capture a graph for every bucket. No sequence is touched.

        progress(buckets done, buckets in all).
        """
        self.state.update([])
        for i, bucket in enumerate(self.buckets):
            self._launch(bucket, no_trace)
            if self._with_graphs:
                self._graphs[bucket] = self._captured(bucket)
            if progress is not None:
                progress(i + 1, len(self.buckets))

    def run(self, rows: Sequence[DecodeRow], trace: Trace | None = None) -> tuple[np.ndarray, Array]:
        """Feed every row's token and draw the next: what `sampling.checked_tokens` takes, (n, 3) int32 on the host, and
        logits (n, n_vocab) on the device, there until the next run.

        trace: sees what a layer has; kernels are then launched one by one. Raises KernelError for rows that do not fit.
        """
        n = len(rows)
        if not 1 <= n <= self.buckets[-1]:
            raise KernelError(f"decode: {n} rows, of 1 to {self.buckets[-1]}")
        self.state.update(rows)
        bucket = next(b for b in self.buckets if b >= n)
        graph = self._graphs.get(bucket) if trace is None else None
        if graph is None:
            self._launch(bucket, trace or no_trace)
        else:
            graph.launch()
        drawn: Any = self._b["drawn"][:n]
        on_host = drawn.copy() if self._ops.xp is np else drawn.get()  # waits for the step
        self.state.advanced(on_host)
        return on_host, self._fused.logits_of(n)

    def _captured(self, bucket: int) -> Any:
        """The launches of a step as a graph. They were made once before, so that nothing compiles or allocates here."""
        xp = self._ops.xp
        xp.cuda.get_current_stream().synchronize()
        stream = xp.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                self._launch(bucket, no_trace)
            finally:
                graph = stream.end_capture()
        return graph

    def _launch(self, bucket: int, trace: Trace) -> None:
        """Every kernel of a step for `bucket` rows."""
        self._fused.n = bucket
        with np.errstate(all="ignore"):
            logits = self._forward(self._cfg, self._weights, self._fused, trace)
        self._sampler.launch(bucket, logits, self._b)
