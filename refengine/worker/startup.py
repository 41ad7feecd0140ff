"""Makes an engine from the worker's options: device, model file, capacity, weights, KV cache.

Runs in the engine's thread. Every failure is a StartFailed with a stable code and, if memory is short, the bytes needed
and available.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refengine.api import load
from refengine.cache.paged import BLOCK_SIZE
from refengine.config import ModelConfig
from refengine.cuda import weight_bytes
from refengine.cuda.runtime.compile import compile_files, missing
from refengine.cuda.runtime.nvrtc import architecture
from refengine.cuda.upload import Described
from refengine.cuda.workspace import packing_bytes
from refengine.device import Device, open_device
from refengine.engine.capacity import Capacity
from refengine.engine.engine import Engine, EngineOptions, default_step_tokens
from refengine.errors import DeviceError, RefengineError, RequestError
from refengine.gguf.file import GGUFFile
from refengine.hub.files import fetch
from refengine.hub.names import parse
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.weights import load_weights
from refengine.worker.jobs.engine_thread import Started
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log
from refengine.worker.telemetry.metrics import EngineHook, Metrics
from refengine.worker.telemetry.status import ModelInfo, State, check_residency


class StartFailed(Exception):
    """The worker cannot start. required, available: bytes of memory, if too little memory is the reason."""

    def __init__(self, code: str, message: str, required: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.required, self.available = code, message, required, available


class Startup:
    """Call it to start the engine. `metrics` is None until the call has returned."""

    def __init__(self, options: WorkerOptions, log: Log) -> None:
        self._options, self._log = options, log
        self.metrics: Metrics | None = None

    def __call__(self) -> Started:
        device = self._open_device()
        model = self._load(device)
        state = State(ModelInfo.of(model))
        self.metrics = Metrics(state)
        capacity = capacity_of(model.config, self._options, device.name, model.weights)
        free = _free_bytes(device)
        n_blocks = _blocks(capacity, free)
        try:
            engine = Engine(model, capacity.engine_options(n_blocks), EngineHook(self.metrics))
            engine.warm_up(self._quarters(25, 50, 75, 100, phase="kernels"))
        except DeviceError as e:
            raise _failed_on_device(e, "too little memory for the KV cache: ") from None
        except MemoryError as e:
            message = f"too little memory for a KV cache of {n_blocks} blocks and a step's buffers: {e}"
            raise StartFailed("INSUFFICIENT_VRAM", message, capacity.needed_bytes(n_blocks), free) from None
        try:
            check_residency(model)
        except DeviceError as e:
            raise StartFailed("CUDA_ERROR", str(e)) from None
        return Started(engine, state)

    def _open_device(self) -> Device:
        try:
            return open_device(self._options.device)
        except RefengineError as e:
            raise StartFailed("CUDA_ERROR", str(e)) from None

    def _load(self, device: Device) -> Model:
        path = self._options.model
        n_bytes: int | None = None
        free = None
        self._log("model_load_start")
        start = time.perf_counter()
        try:
            path = self._fetched(path)
            free = _free_bytes(device)
            with contextlib.ExitStack() as on_failure:
                gguf = on_failure.enter_context(GGUFFile(path))
                n_bytes = self._needed(device, gguf, free)
                self._compile(device)
                with _bar(self._log.for_people) as bar:
                    model = load(
                        gguf,
                        self._options.device,
                        attention=self._options.attention,
                        progress=self._progress(bar),
                        copy_chunk_kb=self._options.copy_chunk_kb,
                        copied=True,  # a mapped file that shrinks would kill the process with SIGBUS
                    )
                on_failure.pop_all()  # The model keeps the file open.
        except DeviceError as e:
            raise _failed_on_device(e) from None
        except MemoryError as e:
            raise StartFailed("INSUFFICIENT_VRAM", f"too little memory for the weights: {e}", n_bytes, free) from None
        except OSError as e:
            raise StartFailed("MODEL_LOAD_FAILED", f"{path} cannot be read: {e.strerror or e}") from None
        except RefengineError as e:
            raise StartFailed("MODEL_LOAD_FAILED", str(e)) from None
        if model.vocabulary is None:
            raise StartFailed("MODEL_LOAD_FAILED", f"{path} has no vocabulary, which a worker needs")
        self._log(
            "model_load_complete", seconds=round(time.perf_counter() - start, 3), weight_bytes=model.weights.n_bytes
        )
        return model

    def _fetched(self, model: Path | str) -> Path:
        """The path of the model's file. Downloads the file first if `model` is a name on the hub."""
        reference = parse(str(model))
        if reference is None:
            return Path(model)
        start = time.perf_counter()

        def tell(text: str) -> None:
            self._log("model_load_progress", phase="download", message=text)

        found = fetch(reference, tell, self._quarters(0, 25, 50, 75, phase="download"))
        self._log(
            "model_load_progress",
            phase="download",
            percent=100,
            pinned=found.pinned,
            commit=found.commit,
            downloaded_bytes=found.n_downloaded,
            seconds=round(time.perf_counter() - start, 3),
        )
        return found.path

    def _compile(self, device: Device) -> None:
        """Compile all kernels that are missing in the cache, in parallel instead of one at each first launch."""
        if not device.name.startswith("cuda"):
            return
        arch = architecture(device.xp)
        files = missing(arch)
        if files:
            start = time.perf_counter()
            message = f"{len(files)} kernel files to compile for {arch}"
            self._log("model_load_progress", phase="kernels", message=message)
            compile_files(arch, files, self._quarters(25, 50, 75, phase="kernels"))
            seconds = round(time.perf_counter() - start, 3)
            self._log("model_load_progress", phase="kernels", percent=100, seconds=seconds)

    def _needed(self, device: Device, gguf: GGUFFile, free: int | None) -> int:
        """The bytes of memory that the start needs at least. Raises StartFailed if fewer are free (W-1020)."""
        config = read_config(gguf)
        specs = BY_ARCHITECTURE[config.arch].tensors(config)
        shapes = None if device.name == "cpu" else load_weights(gguf, specs, config.n_layer, Described())
        capacity = capacity_of(config, self._options, device.name, shapes)
        _check_asked(capacity)
        tensors = gguf.tensors.values()
        if device.name == "cpu":
            return sum(info.n_bytes for info in tensors) + capacity.needed_bytes(capacity.min_blocks)
        weights, cache_and_steps = weight_bytes(tensors), capacity.needed_bytes(capacity.min_blocks)
        needed = weights + max(cache_and_steps, packing_bytes(tensors))
        if free is not None and needed > free:
            raise StartFailed(
                "INSUFFICIENT_VRAM",
                f"{gguf.path} on {device.name}: {weights} bytes of weights and {needed - weights} bytes for a KV cache "
                f"of {capacity.min_blocks} blocks and a step's buffers do not fit into {free} bytes: use a smaller "
                "model, a smaller --kv-cache-size-mb, --max-batch or --max-step-tokens, or another device",
                needed,
                free,
            )
        return needed

    def _progress(self, bar: Any) -> Callable[[int, int], None]:
        """A callback (bytes done, total bytes) that logs every quarter and moves the progress bar."""
        quarters = self._quarters(0, 25, 50, 75, 100)

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            quarters(done, total)

        progress(0, 1)
        return progress

    def _quarters(self, *percents: int, **fields: Any) -> Callable[[int, int], None]:
        """A callback (done, total) that logs each of these percentages, with `fields`, when it is reached."""
        left = list(percents)

        def progress(done: int, total: int) -> None:
            while left and done * 100 >= left[0] * total:
                self._log("model_load_progress", **fields, percent=left.pop(0))

        return progress


def _failed_on_device(error: DeviceError, memory_prefix: str = "") -> StartFailed:
    """The StartFailed of a device error. memory_prefix: begins the message if the cause is too little memory."""
    if error.required is None:
        return StartFailed("CUDA_ERROR", str(error))
    return StartFailed("INSUFFICIENT_VRAM", f"{memory_prefix}{error}", error.required, error.available)


def _free_bytes(device: Device) -> int | None:
    """The free memory of a GPU in bytes; None for other devices."""
    return int(device.xp.cuda.runtime.memGetInfo()[0]) if device.name.startswith("cuda") else None


def capacity_of(config: ModelConfig, options: WorkerOptions, device: str, weights: Any) -> Capacity:
    """The capacity of the engine that these options ask for. weights: as for `Capacity`."""
    engine_options = EngineOptions(
        max_batch=options.max_batch,
        max_step_tokens=options.max_step_tokens or default_step_tokens(device),
        prefix_cache=options.prefix_cache,
        batching=options.batching,
        on_shortage=options.on_shortage,
        graphs=options.graphs,
        ahead=options.ahead,
    )
    asked_bytes = None if options.kv_cache_size_mb is None else options.kv_cache_size_mb << 20
    return Capacity(config, engine_options, device, weights, asked_bytes, options.attention)


def _check_asked(capacity: Capacity) -> None:
    """Raises StartFailed if the requested KV cache is smaller than one block."""
    if not capacity.min_blocks:
        requested, block = capacity.asked_bytes or 0, capacity.cache_bytes(1)
        message = (
            f"--kv-cache-size-mb: given {requested >> 20}, but one block of {BLOCK_SIZE} tokens takes {block} bytes"
        )
        raise StartFailed("INSUFFICIENT_VRAM", message, block, requested)


def _blocks(capacity: Capacity, free: int | None) -> int:
    """The number of KV cache blocks, after loading the weights. Raises StartFailed if too little memory is left.

    free: the free bytes of a GPU; None for other devices.
    """
    n_blocks = capacity.blocks(free)
    if not n_blocks:
        least = capacity.min_blocks
        raise StartFailed(
            "INSUFFICIENT_VRAM",
            f"too little memory for a KV cache of {least} blocks and a step's buffers: the weights leave {free} bytes",
            capacity.needed_bytes(least),
            free,
        )
    return n_blocks


def _bar(shown: bool) -> Any:
    return tqdm(desc="loading", unit="B", unit_scale=True, disable=not shown, leave=False, file=sys.stderr)


def failure_of(error: BaseException) -> StartFailed:
    """Convert any exception of the start to a StartFailed."""
    if isinstance(error, StartFailed):
        return error
    if isinstance(error, RequestError):
        return StartFailed("INVALID_REQUEST", str(error))
    code = "CUDA_ERROR" if "CUDA" in type(error).__name__ else "INTERNAL"
    return StartFailed(code, f"{type(error).__name__}: {error}")
