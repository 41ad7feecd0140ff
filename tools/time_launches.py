"""Measures the time that Python takes to launch the kernels of a prompt, without a GPU.

    python -m tools.time_launches --model qwen2-q4_k_m --layers 24 --tokens 512

Everything runs as on a GPU, with CuPy's arrays at made-up addresses, but the driver's function that launches a kernel
is replaced by one that does nothing; the driver takes 2 to 3 µs a launch more. The time hardly depends on the sizes of
a model, so a tiny one of `tools.make_model --list` with the layers of the model in question is enough. Needs CuPy
(extra `nvrtc`).
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from refengine.array import Array
from refengine.cache.paged import CacheSequence
from refengine.cuda.decode.prompt import PromptPass
from refengine.cuda.layout import PackedMatrix, packed_bytes
from refengine.cuda.memory import DeviceMemory
from refengine.cuda.ops import KernelOps
from refengine.cuda.runtime import driver
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.nvrtc import DeviceModule
from refengine.cuda.runtime.source import Constants, Source, read_source
from refengine.gguf.file import GGUFFile
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.weights import Matrix, load_weights
from tools.make_model import TINY, write_spec


class NoMemory:
    __slots__ = ()

    def __init__(self, n_bytes: int) -> None:
        pass


def arrays_without_memory() -> Any:
    """CuPy, as far as a prompt needs it, with arrays that have addresses but no memory."""
    import cupy

    class Pointer(cupy.cuda.MemoryPointer):
        def memset(self, *_: Any) -> None:
            """Does nothing."""

    class Elsewhere(cupy.ndarray):
        def __setitem__(self, *_: Any) -> None:
            """Does nothing."""

    def array(shape: Any, dtype: Any = np.float32, memptr: Any = None) -> Any:
        return Elsewhere(shape, dtype, memptr or start)

    start = Pointer(cupy.cuda.UnownedMemory(1 << 40, 1 << 40, None, 0), 0)
    cuda = SimpleNamespace(
        Memory=NoMemory,
        MemoryPointer=lambda memory, offset: start,
        MemoryPool=lambda allocate: SimpleNamespace(malloc=None),
        using_allocator=lambda malloc: nullcontext(),
        runtime=SimpleNamespace(memGetInfo=lambda: (1 << 40, 1 << 40)),
    )
    return SimpleNamespace(ndarray=array, empty=array, asarray=lambda a: array(a.shape, a.dtype), cuda=cuda)


class Unloaded(DeviceModule):
    """A kernel file that is neither compiled nor loaded."""

    def __init__(self, source: Source) -> None:
        stream, limit = SimpleNamespace(ptr=0), "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        attributes = {limit: 0, "CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT": 0}
        self.source, self._overlaps, self._launchers, self._shared_limits = source, True, {}, {}
        self._carved = set()
        functions = {"funcSetAttribute": lambda *_: None, "funcGetAttribute": lambda *_: 0}
        self._driver, self._stream = SimpleNamespace(**attributes, **functions), lambda: stream

    def raw_kernel(self, kernel: str) -> Any:
        return SimpleNamespace(kernel=SimpleNamespace(ptr=1))


class KernelsWithoutDevice(Kernels):
    n_multiprocessors, shared_limit = 132, 227 << 10

    def module(self, file: str, constants: Constants = ()) -> Any:
        if (file, constants) not in self._modules:
            self._modules[file, constants] = Unloaded(read_source(file, constants))
        return self._modules[file, constants]


class Nowhere:
    """A `weights.Placement` that keeps no weights."""

    in_place = False

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def vector(self, values: np.ndarray) -> Array:
        vector: Array = self._xp.empty(values.shape)
        return vector

    def matrix(self, w: Matrix, done: Any = None) -> PackedMatrix:
        return PackedMatrix(w.name, w.type, tuple(w.shape), self._xp.empty((packed_bytes(w.type, w.shape),), np.uint8))


def loaded(path: Path) -> Model:
    xp, gguf = arrays_without_memory(), GGUFFile(path)
    cfg = read_config(gguf)
    weights = load_weights(gguf, BY_ARCHITECTURE[cfg.arch].tensors(cfg), cfg.n_layer, Nowhere(xp))
    ops: Any = KernelOps(xp, KernelsWithoutDevice("cuda"), DeviceMemory(xp))
    nothing: Any = None
    return Model(gguf, cfg, nothing, weights, ops, nothing)


def seconds_of(model: Model, n_tokens: int, rounds: int, launch: Callable[..., object]) -> list[float]:
    """The seconds of each pass over a prompt. launch: is called instead of the driver's function, once a launch."""
    cache = model.new_cache(n_tokens)
    n_positions = cache.n_blocks * cache.block_size

    def angles(number: int, constants: Any, freq_factors: Array | None) -> tuple[Array, Array]:
        table = model.ops.xp.empty((n_positions, constants.n_rot // 2))
        return table, table

    seconds = []
    with mock.patch.object(driver, "_launch", return_value=launch):
        assert model.decode is not None
        prompts = PromptPass(model.ops, model.config, model.decode, model.weights, cache, n_positions, angles)
        for _ in range(rounds):
            sequence = CacheSequence()
            start = time.perf_counter()
            prompts.run(cache.batch([(sequence, [0] * n_tokens)], [n_tokens - 1]))
            seconds.append(time.perf_counter() - start)
            cache.free(sequence)
    return seconds


def report(name: str, n_layer: int, n_tokens: int, rounds: int) -> str:
    """One line with the number of launches of a prompt and the times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_spec(path, replace(TINY[name], n_layer=n_layer, n_ctx=max(TINY[name].n_ctx, n_tokens)))
        launches: list[None] = []
        seconds_of(loaded(path), n_tokens, 1, lambda *_: launches.append(None))
        nothing = ctypes.CDLL(None).getpid
        nothing.restype = None
        first, *others = seconds_of(loaded(path), n_tokens, rounds + 1, nothing)
    least = min(others)
    return (
        f"{name}, {n_layer} layers, {n_tokens} tokens: {len(launches)} launches, {1e3 * least:.2f} ms, "
        f"{1e6 * least / len(launches):.2f} µs a launch; the first time, {1e3 * first:.1f} ms"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-q4_k_m", choices=sorted(TINY), metavar="NAME")
    parser.add_argument("--layers", type=int, default=24, metavar="N")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    parser.add_argument("--rounds", type=int, default=100, metavar="N")
    a = parser.parse_args(argv)
    print(report(a.model, a.layers, a.tokens, a.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
