"""llama.cpp as an engine under test: llama_decode on batches, as llama-bench calls it, without sampling.

Layers are on the GPU with flash attention if the device is one; on the CPU weights are repacked for its fastest
kernels, unless it crashes with them, and it chooses its attention itself. The KV cache is float16; several sequences
have parts of it of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from refengine.bench.speed.measure import Sample
from refengine.bench.speed.traffic import cache_bytes_read, weight_bytes
from refengine.errors import MissingLibraryError, RefengineError, RequestError
from refengine.gguf.file import GGUFFile
from refengine.models import read_config
from refengine.validate.llamacpp import GGML_TYPE_F16, INSTALL_HINT, last_log, library, open_model

MAX_BATCH = 2048  # tokens of one call of llama_decode, as in llama-bench
PADDING = 256  # positions; llama.cpp rounds the context of a sequence up to a multiple


def check_installed() -> None:
    """Raises MissingLibraryError, which says how to install it, if llama-cpp-python is missing."""
    if find_spec("llama_cpp") is None:
        raise MissingLibraryError(
            f"--compare llama.cpp needs llama-cpp-python, which is not installed; {INSTALL_HINT}", "llama_cpp"
        )


class LlamaCppSpeed:
    """A model in llama.cpp. An `EngineUnderTest`; `close` frees the library's memory.

    device: `cpu` or `cuda:N`. chunk: the tokens of a micro-batch. threads: of the CPU.
    repack: see `validate.llamacpp.LlamaCpp`.
    Raises RefengineError if llama-cpp-python is not installed or cannot use the device, ModelError if llama.cpp
    refuses the file.
    """

    def __init__(self, path: str, device: str, chunk: int, threads: int, repack: bool = True) -> None:
        self._lib = library()
        self._gpu = None if device == "cpu" else int(device.partition(":")[2] or 0)
        if self._gpu is not None and not self._lib.llama_supports_gpu_offload():
            raise RequestError(
                f"--compare llama.cpp on {device}: the installed llama-cpp-python {self._lib.__version__} was built "
                "without GPU support; install it with CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall "
                f"--no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={self._lib.__version__}"
            )
        self._model = open_model(path, repack=repack, gpu=self._gpu)
        self._gguf = GGUFFile(path)
        self._config = read_config(self._gguf)
        self._has_window = self._lib.llama_model_n_swa(self._model) > 0
        self._chunk, self._threads = chunk, threads
        self._context: Any = None
        self._batch = _Batch(self._lib, MAX_BATCH)
        self._made_for = (0, 0)
        self._filled = 0  # positions that every sequence has in the cache
        self._draw = np.random.default_rng(0)

    @property
    def version(self) -> str:
        return f"llama-cpp-python {self._lib.__version__}"

    @property
    def system(self) -> str:
        """The instructions and libraries that the build uses."""
        return str(self._lib.llama_print_system_info().decode()).strip(" |")

    # --- EngineUnderTest ---

    def prompt(self, n: int) -> Sample:
        self._context_for(1, n + 1)
        self._clear()
        ids = self._ids(n)
        start = time.perf_counter()
        self._feed(ids, np.arange(n), np.zeros(n, int), last_only=True)
        return Sample(time.perf_counter() - start, n)

    def decode(self, streams: int, depth: int, tokens: int) -> Sample:
        self._context_for(streams, max(depth, 1) + tokens + 1)
        self._fill(streams, max(depth, 1))
        sequences, ids = np.arange(streams), self._ids(streams * tokens).reshape(tokens, streams)
        start = time.perf_counter()
        for step, row in enumerate(ids):
            self._feed(row, np.full(streams, self._filled + step), sequences)
        seconds = time.perf_counter() - start
        return Sample(seconds, streams * tokens, self._filled + 1 + (tokens - 1) / 2)

    def step_bytes(self, streams: int, positions: float) -> int:
        weights = weight_bytes(self._gguf.tensors, self._config, lambda info: info.n_bytes)
        return int(weights + cache_bytes_read(self._config, streams, positions, self.cache_bytes(1)))

    def cache_bytes(self, n_positions: int) -> int:
        return 2 * 2 * self._config.n_layer * self._config.n_embd_kv * n_positions

    # --- The context and its cache ---

    def _context_for(self, streams: int, positions: int) -> None:
        """Make a context for `streams` sequences of `positions` each, unless the last one is that."""
        if self._made_for == (streams, positions):
            return
        self._free_context()
        params = self._lib.llama_context_default_params()
        params.n_ctx = streams * (-(-positions // PADDING) * PADDING)
        params.n_seq_max = streams
        params.n_batch, params.n_ubatch = MAX_BATCH, self._chunk
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = GGML_TYPE_F16
        params.swa_full = False
        params.offload_kqv = self._gpu is not None
        if self._gpu is not None:
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RefengineError(f"llama.cpp cannot create a context of {params.n_ctx} positions: {last_log()}")
        self._made_for = (streams, positions)

    def _fill(self, streams: int, depth: int) -> None:
        """Bring `depth` tokens of each sequence into the cache. What the steps before appended is dropped."""
        memory = self._lib.llama_get_memory(self._context)
        if self._filled == depth and not self._has_window:
            for sequence in range(streams):
                self._lib.llama_memory_seq_rm(memory, sequence, depth, -1)
            return
        self._clear()
        positions = np.tile(np.arange(depth), streams)
        self._feed(self._ids(streams * depth), positions, np.repeat(np.arange(streams), depth), last_only=True)
        self._filled = depth

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._filled = 0

    def _feed(self, ids: np.ndarray, positions: np.ndarray, sequences: np.ndarray, last_only: bool = False) -> None:
        """Compute tokens (n,) at their positions of their sequences, and wait. last_only: logits of the last one."""
        for first in range(0, len(ids), MAX_BATCH):
            part = slice(first, first + MAX_BATCH)
            batch = self._batch.filled(ids[part], positions[part], sequences[part], last_only)
            status = self._lib.llama_decode(self._context, batch)
            if status != 0:
                raise RefengineError(f"llama.cpp could not compute {len(ids)} tokens (status {status}): {last_log()}")
        self._lib.llama_synchronize(self._context)

    def _ids(self, n: int) -> np.ndarray:
        return self._draw.integers(0, self._config.n_vocab, n)

    def _free_context(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._context, self._made_for, self._filled = None, (0, 0), 0

    def close(self) -> None:
        self._free_context()
        self._batch.free()
        self._lib.llama_model_free(self._model)


class _Batch:
    """The library's batch for up to `capacity` tokens, filled through NumPy views of its arrays."""

    def __init__(self, lib: Any, capacity: int) -> None:
        self._lib, self._raw = lib, lib.llama_batch_init(capacity, 0, 1)
        fields = ("token", "pos", "n_seq_id", "logits")
        self._token, self._pos, n_sequences, self._logits = (
            np.ctypeslib.as_array(getattr(self._raw, name), (capacity,)) for name in fields
        )
        n_sequences[:] = 1

    def filled(self, ids: np.ndarray, positions: np.ndarray, sequences: Sequence[int] | np.ndarray, last: bool) -> Any:
        """The batch with these tokens. last: logits are wanted of the last one only, not of all."""
        n = len(ids)
        self._token[:n], self._pos[:n], self._logits[:n] = ids, positions, not last
        self._logits[n - 1] = 1
        for i, sequence in enumerate(sequences):
            self._raw.seq_id[i][0] = sequence
        self._raw.n_tokens = n
        return self._raw

    def free(self) -> None:
        self._lib.llama_batch_free(self._raw)
