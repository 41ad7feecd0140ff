"""refengine as an engine under test: the engine as the worker runs it, with its default features."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from refengine.api import load
from refengine.bench.speed.measure import Sample
from refengine.bench.speed.profile import Profile, profiled
from refengine.bench.speed.traffic import cache_bytes_read, copy_rates, free_memory, weight_bytes
from refengine.cache.paged import BLOCK_SIZE, KVCache
from refengine.cuda.layout import packed_bytes
from refengine.engine.engine import Engine, EngineOptions
from refengine.engine.generation import Generation
from refengine.engine.sampling import SamplingParams
from refengine.errors import RefengineError
from refengine.gguf.file import TensorInfo
from refengine.weights import is_vector, quant_kind


class Refengine:
    """A model in refengine's engine, with greedy sampling. An `EngineUnderTest`.

    chunk: how many prompt tokens one forward pass computes at most. threads: of the copy whose bandwidth is measured;
    those of NumPy's products are set by the environment of the process.
    """

    def __init__(self, path: str, device: str, numerics: str | None, chunk: int, threads: int) -> None:
        self.model = load(path, device, numerics)
        # Without a vocabulary no token ends a sequence, so that every stream lasts as long as is measured.
        self.model.vocabulary = None
        self._chunk, self._threads = chunk, threads
        self._engine: Engine | None = None
        self._made_for = (0, 0)
        self._draw = np.random.default_rng(0)

    # --- EngineUnderTest ---

    def prompt(self, n: int) -> Sample:
        engine = self._engine_for(1, n + 1)
        start = time.perf_counter()
        generation = engine.start(self._ids(self._draw, n), SamplingParams(temperature=0, max_tokens=1))
        engine.next_token(generation)
        seconds = time.perf_counter() - start
        engine.free(generation)
        return Sample(seconds, n)

    def decode(self, streams: int, depth: int, tokens: int) -> Sample:
        with self._decoding(streams, depth, tokens) as (engine, running):
            before = sum(len(generation.ids) for generation in running)
            start = time.perf_counter()
            for _ in range(tokens):
                engine.step()
            seconds = time.perf_counter() - start
            computed = sum(len(generation.ids) for generation in running) - before
        if computed != streams * tokens:
            raise RefengineError(f"{streams * tokens} tokens were to be computed, but only {computed} were")
        return Sample(seconds, computed, before / streams + (tokens - 1) / 2)

    def step_bytes(self, streams: int, positions: float) -> int:
        config = self.model.config
        weights = weight_bytes(self.model.gguf.tensors, config, self._resident_bytes)
        return int(weights + cache_bytes_read(config, streams, positions, self._bytes_per_position))

    def cache_bytes(self, n_positions: int) -> int:
        return int(KVCache.blocks_for(n_positions) * BLOCK_SIZE * self._bytes_per_position)

    # --- Beyond the protocol ---

    def facts(self) -> dict[str, Any]:
        """The model, the device and the profile of numerics, as JSON data."""
        model = self.model
        return {
            "name": model.config.name,
            "architecture": model.config.arch,
            "quant_kind": quant_kind(model.gguf),
            "file_bytes": model.gguf.file_size,
            "n_ctx": model.n_ctx,
            "device": model.device.name,
            "numerics": model.ops.numerics.name,
            "kv_type": np.dtype(model.ops.numerics.kv_dtype).name,
        }

    def copy_rates(self) -> list[float]:
        """The bytes per second of a copy on this device; see `traffic.copy_rates`."""
        xp = self.model.ops.xp
        return copy_rates(xp, self._threads, free_memory(xp))

    def free_memory(self) -> int:
        """The free memory of the device in bytes."""
        return free_memory(self.model.ops.xp)

    def profile(self, streams: int, depth: int, tokens: int) -> Profile:
        """The time of a decode step by kernel, or by operation of the array code. No graphs are used."""
        self._forget()
        cache = cache_bytes_read(self.model.config, streams, max(depth, 1) + tokens / 2, self._bytes_per_position)
        timed = profiled(self.model, self._resident_bytes, cache)
        try:
            with timed as profiler, self._decoding(streams, depth, tokens + 1, graphs=False) as (engine, _):
                engine.step()  # not measured
                profiler.begin()
                for _ in range(tokens):
                    engine.step()
                return profiler.end(tokens)
        finally:
            self._forget()  # all launches of this engine are timed

    # --- The engine and its sequences ---

    @contextmanager
    def _decoding(
        self, streams: int, depth: int, tokens: int, graphs: bool = True
    ) -> Iterator[tuple[Engine, list[Generation]]]:
        """An engine in which `streams` sequences have their prompts in the cache and have got their first token."""
        prompt = max(depth, 1)
        # While the prompts of the last streams are computed, the first ones already decode.
        lead = 0 if streams == 1 or streams * prompt <= self._chunk else 2 + 2 * streams * prompt // self._chunk
        engine = self._engine_for(streams, prompt + 1 + lead + tokens, graphs)
        params = SamplingParams(temperature=0, max_tokens=1 + lead + tokens)
        # The same prompts every time: after the first, the prefix cache has nearly all of them.
        draw = np.random.default_rng(1)
        running = [engine.start(self._ids(draw, prompt), params) for _ in range(streams)]
        try:
            while any(generation.n_generated == 0 for generation in running):
                engine.step()
            yield engine, running
        finally:
            for generation in running:
                engine.free(generation)

    def _engine_for(self, streams: int, positions: int, graphs: bool = True) -> Engine:
        """An engine for `streams` sequences of `positions` each; the same again if it was asked for last."""
        if self._engine is None or self._made_for != (streams, positions):
            self._forget()
            n_tokens = streams * KVCache.blocks_for(positions) * BLOCK_SIZE
            # Without graphs, each step is launched within the call that is timed.
            options = EngineOptions(streams, self._chunk, n_tokens, graphs=graphs, ahead=graphs)
            self._engine = Engine(self.model, options)
            self._engine.warm_up()
            self._made_for = (streams, positions)
        return self._engine

    def _forget(self) -> None:
        """Free the memory of the last engine."""
        self._engine = None
        gc.collect()  # its parts know each other

    def _ids(self, draw: np.random.Generator, n: int) -> list[int]:
        ids: list[int] = draw.integers(0, self.model.config.n_vocab, n).tolist()
        return ids

    @cached_property
    def _bytes_per_position(self) -> float:
        """The bytes of the KV cache of one position, in all layers."""
        return self.model.new_cache(BLOCK_SIZE).n_bytes / BLOCK_SIZE

    def _resident_bytes(self, info: TensorInfo) -> float:
        """The bytes that a product reads of a tensor: as it lies in memory."""
        ops: Any = self.model.ops
        n = int(np.prod(info.shape))
        if is_vector(info):
            return 4 * n
        if hasattr(ops, "kernels"):
            return packed_bytes(info.type, info.shape)
        return n * np.dtype(ops.numerics.sum_dtype).itemsize if info.name in ops.cache else info.n_bytes
