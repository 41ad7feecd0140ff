"""The bytes that a decode step must read at least, and the bandwidth of a copy on the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from refengine.config import ModelConfig
from refengine.gguf.file import TensorInfo

COPY_REPEATS = 5
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # many times a cache
GPU_COPIES = 10  # in one timing, so that the launch does not count
MEMORY_SHARE = 8  # an array that is copied takes at most an eighth of the free memory, but
LEAST_BYTES = 1 << 20


def weight_bytes(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, size_of: Callable[[TensorInfo], float]
) -> float:
    """The bytes of the weights that a step reads once. size_of: the bytes in which an engine keeps a tensor.

    An embedding, of which a step reads one row a stream, counts only if it is also the output matrix. Of the matrices
    of experts, those of the experts of one token count.
    """
    total = 0.0
    for name, info in tensors.items():
        is_output = name == "token_embd.weight" and "output.weight" not in tensors
        if name.endswith("_embd.weight") and not is_output:
            continue
        total += size_of(info) * expert_share(name, config)
    return total


def expert_share(name: str, config: ModelConfig) -> float:
    """The part of a tensor that one token needs: 1, or for experts the share of those that are used."""
    return config.n_expert_used / config.n_expert if "_exps." in name else 1.0


def cache_bytes_read(config: ModelConfig, streams: int, positions: float, bytes_per_position: float) -> float:
    """The bytes of the KV cache that a step reads.

    bytes_per_position: of all layers together. A layer with a sliding window reads no more positions than its window.
    """
    windows = [config.swa_window(il) or positions for il in range(config.n_layer)]
    read = sum(min(positions, window) for window in windows) / config.n_layer
    return streams * read * bytes_per_position


def copy_rates(xp: Any, threads: int, free_bytes: int) -> list[float]:
    """The bytes per second, read and written, of copies of a large array, `COPY_REPEATS` samples after one more.

    NumPy copies with `threads` threads, CuPy with the whole GPU. free_bytes: how much memory is free.
    """
    n_bytes = max(LEAST_BYTES, min(COPY_BYTES["cpu" if xp is np else "cuda"], free_bytes // MEMORY_SHARE))
    source = xp.ones(n_bytes, xp.uint8)
    target = xp.empty_like(source)
    if xp is np:
        found = _copies_on_cpu(source, target, threads)
    else:
        found = _copies_on_gpu(xp, source, target)
        del source, target
        xp.get_default_memory_pool().free_all_blocks()
    return [2 * n_bytes / seconds for seconds in found[1:]]


def _copies_on_cpu(source: Any, target: Any, threads: int) -> list[float]:
    sources, targets = np.array_split(source, threads), np.array_split(target, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_REPEATS + 1):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            seconds.append(time.perf_counter() - start)
    return seconds


def _copies_on_gpu(xp: Any, source: Any, target: Any) -> list[float]:
    seconds = []
    for _ in range(COPY_REPEATS + 1):
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        start.record()
        for _ in range(GPU_COPIES):
            xp.copyto(target, source)
        stop.record()
        stop.synchronize()
        seconds.append(xp.cuda.get_elapsed_time(start, stop) / 1e3 / GPU_COPIES)
    return seconds


def free_memory(xp: Any) -> int:
    """The free memory of the device in bytes; of the machine, if the arrays are NumPy's."""
    if xp is not np:
        return int(xp.cuda.runtime.memGetInfo()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
