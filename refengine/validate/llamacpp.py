"""llama.cpp as a peer: its logits and all intermediate float tensors, live, with llama-cpp-python.

Runs on the CPU backend without flash attention, with weights as the file stores them, so that the arithmetic of its
source is compared. Tensors are read in the scheduler's evaluation callback (`cb_eval`) with ctypes: the ne, nb, data
and name of a `ggml_tensor` (ggml/include/ggml.h).

Names and shapes follow refengine: NumPy axis order, and `Qcur-0#0` for the first of several nodes called `Qcur-0`.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from refengine.errors import ModelError, RefengineError, RequestError, install_hint
from refengine.validate.alignment import SCORES, row_axis
from refengine.validate.capture import Capture

INSTALL_HINT = f"{install_hint('validate')}: that builds llama.cpp, with a C++ compiler, in a few minutes"
GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_I32 = 0, 1, 26
_NUMPY_TYPES = {GGML_TYPE_F32: np.float32, GGML_TYPE_F16: np.float16, GGML_TYPE_I32: np.int32}
GGML_LOG_LEVEL_DEBUG = 4
ALL_LAYERS = 1 << 16  # more layers than a model has
_VIEW_OPS = {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "NONE"}


class _GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor`, up to and including its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class LlamaCpp:
    """A model loaded by llama.cpp. A context manager; `close` frees the library's memory.

    kv_type: `f16` or `f32`. n_threads: CPU threads. n_ctx: context length in tokens.
    n_ubatch: tokens of a micro-batch (default: all tokens of a call).
    repack: let llama.cpp reorder weights at load for its fastest kernels (False: weights as stored in the file).
    capture: install the evaluation callback that `tensors` needs; it is slower, because the graph runs node by node.
    Raises `RefengineError` if llama-cpp-python is not installed, `ModelError` if llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kv_type: str = "f16",
        n_ctx: int = 512,
        n_threads: int = 2,
        flash_attention: bool = False,
        repack: bool = False,
        n_ubatch: int | None = None,
        capture: bool = True,
    ) -> None:
        llama_cpp = library()
        kv_types = {"f16": GGML_TYPE_F16, "f32": GGML_TYPE_F32}
        if kv_type not in kv_types:
            raise RequestError(f"unknown KV cache type {kv_type!r} for llama.cpp; choose one of {', '.join(kv_types)}")
        self._lib = llama_cpp
        self.version: str = llama_cpp.__version__
        self._model = open_model(path, repack=repack)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        if n_ubatch is not None and not 1 <= n_ubatch <= n_ctx:
            raise RequestError(f"llama.cpp's micro-batch of {n_ubatch} tokens must be 1 to {n_ctx}")
        self._n_ubatch = n_ubatch or n_ctx
        params.n_batch, params.n_ubatch = n_ctx, self._n_ubatch
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = 1 if flash_attention else 0
        params.type_k = params.type_v = kv_types[kv_type]
        params.swa_full = True  # cells stay in the order of positions, also in layers with a sliding window
        params.offload_kqv = False
        if capture:
            self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_eval)
            params.cb_eval = self._callback
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelError(f"{path}: llama.cpp cannot create a context: {last_log()}")
        self._filter: re.Pattern[str] | None = None
        self._captured: list[tuple[str, str, np.ndarray]] = []
        self._callback_error: BaseException | None = None
        self._n_past = 0

    def logits(self, ids: Sequence[int], last_only: bool = False) -> np.ndarray:
        """The logits of all `ids` (or the last), (n, n_vocab) float32. The ids continue those of earlier calls."""
        lib, n = self._lib, len(ids)
        if n == 0:
            raise RequestError("no tokens to evaluate")
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = self._n_past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = int(not last_only or i == n - 1)
            batch.n_tokens = n
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if self._callback_error is not None:
            raise self._callback_error
        if status != 0:
            raise RefengineError(f"llama.cpp could not evaluate {n} tokens (status {status}): {last_log()}")
        self._n_past += n
        rows = ctypes.cast(lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(rows, shape=(1 if last_only else n, self.n_vocab)).copy()

    def tensors(self, ids: Sequence[int], pattern: str = "") -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Like `logits`, with the tensors whose name matches the regular expression, in NumPy order without leading 1s.

        Views (reshape, permute) are omitted. If several nodes have the same name, the last one has the plain name.
        Micro-batches are joined along the rows; `kq` is then omitted, because its columns for later tokens are missing.
        """
        self._filter, self._captured, self._callback_error = re.compile(pattern), [], None
        try:
            logits = self.logits(ids)
        finally:
            self._filter = None
        by_name: dict[str, list[np.ndarray]] = {}
        for name, _, value in self._captured:
            by_name.setdefault(name, []).append(value)
        n_batches = -(-len(ids) // self._n_ubatch)
        named: dict[str, np.ndarray] = {}
        for name, parts in by_name.items():
            values = parts if n_batches == 1 else _joined(name, parts, n_batches)
            named.update({f"{name}#{i}": value for i, value in enumerate(values[:-1])})
            if values:
                named[name] = values[-1]
        return logits, named

    def ops(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, ggml operation and shape of each tensor that the last `tensors` call captured, in order."""
        return [(name, op, value.shape) for name, op, value in self._captured]

    def reset(self) -> None:
        """Clear the KV cache and start at position 0."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._n_past = 0

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _on_eval(self, pointer: int, ask: bool, user_data: Any) -> bool:
        """llama.cpp's callback, called twice per node: with `ask`, returns whether the value is needed; then with the
        value, returns True to continue."""
        if self._filter is None:
            return not ask  # no value is needed; after a node the run always continues
        try:
            tensor = ctypes.cast(pointer, ctypes.POINTER(_GgmlTensor)).contents
            name = tensor.name.decode("utf-8", "replace")
            is_captured = self._filter.search(name) is not None and tensor.type in _NUMPY_TYPES
            if ask:
                return is_captured
            op = self._op_name(pointer)
            if is_captured and op not in _VIEW_OPS:
                self._captured.append((name, op, _read(tensor)))
            return True
        except Exception as e:  # an exception must not propagate into C
            self._callback_error = e
            return False

    def _op_name(self, pointer: int) -> str:
        desc = _ggml_base().ggml_op_desc
        desc.restype, desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        return str(desc(pointer).decode())


def _joined(name: str, parts: list[np.ndarray], n_batches: int) -> list[np.ndarray]:
    """Join a name's values of all micro-batches, in order of evaluation, to one value per occurrence."""
    if name.startswith("kq-") or len(parts) % n_batches or any(p.ndim < 2 for p in parts):
        return []
    n, axis, joined = len(parts) // n_batches, row_axis(name), []
    for occurrence in range(n):
        values = parts[occurrence::n]
        if name.startswith(SCORES):  # the cache grows; positions that are not in it yet have weight 0
            width = max(v.shape[-1] for v in values)
            values = [np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - v.shape[-1])]) for v in values]
        joined.append(np.concatenate(values, axis=axis))
    return joined


def capture_llamacpp(path: str | os.PathLike[str], ids: Sequence[int], **options: Any) -> Capture:
    """All tensors that llama.cpp computes for a prompt. options: those of `LlamaCpp`.

    Raises the errors of `LlamaCpp`, and `RefengineError` if llama.cpp crashes with the repacked weights asked for.
    """
    if options.get("repack") and repack_crashes(path):
        raise RefengineError(f"{path}: llama.cpp crashes with repacked weights on this processor; do not repack them")
    options.setdefault("n_ctx", max(512, len(ids)))
    with LlamaCpp(path, **options) as peer:
        _, tensors = peer.tensors(ids)
        engine = f"llama.cpp (llama-cpp-python {peer.version})"
    return Capture(Path(path), engine, list(ids), tensors, numerics="llamacpp", flags=options)


_TRIAL = """
import sys
from refengine.validate.llamacpp import LlamaCpp
LlamaCpp(sys.argv[1], repack=True, capture=False).logits([0, 0], last_only=True)
"""


def repack_crashes(path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> bool:
    """Whether llama.cpp dies of a signal with repacked weights, found by two tokens in a process of its own.

    It does on processors with AMX if ggml was built by a compiler (such as GCC 12.2) whose `_tile_loadconfig` declares
    only the first 8 of the 64 bytes it reads: the stores to the others are optimised away, and the first product of
    more than one row faults. environment: what the process has in its environment besides ours.
    """
    done = subprocess.run(
        [sys.executable, "-c", _TRIAL, str(path)],
        capture_output=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return done.returncode < 0 and done.returncode != -signal.SIGKILL  # which is sent when memory runs out


def open_model(path: str | os.PathLike[str], *, repack: bool, gpu: int | None = None) -> Any:
    """Load a model with llama.cpp; returns the library's pointer, to be freed with `llama_model_free`.

    repack: see `LlamaCpp`. gpu: the number of the GPU that gets all layers; None keeps them on the CPU.
    Raises the errors of `LlamaCpp`.
    """
    llama_cpp = library()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = repack
    params.n_gpu_layers = 0
    if gpu is not None:
        params.n_gpu_layers, params.main_gpu = ALL_LAYERS, gpu
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(str(Path(path)).encode(), params)
    if not model:
        raise ModelError(f"{path}: llama.cpp cannot load this file: {last_log()}")
    return model


def quantize(source: str | os.PathLike[str], output: str | os.PathLike[str], file_type: int) -> None:
    """Quantise the float GGUF file `source` to `output` with llama.cpp's `llama_model_quantize`.

    file_type: a `gguf.LlamaFileType`, such as MOSTLY_Q4_K_M. Raises `RefengineError` without llama-cpp-python,
    `ModelError` if llama.cpp refuses the file.
    """
    llama_cpp = library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    if llama_cpp.llama_model_quantize(str(Path(source)).encode(), str(Path(output)).encode(), ctypes.byref(params)):
        raise ModelError(f"{source}: llama.cpp cannot quantise this file: {last_log()}")


_log_lines: list[str] = []
_log_file: int | None = None
_log_callback: Any = None  # C code keeps a pointer to it, so it must outlive every context


def log_to(descriptor: int) -> None:
    """From now on, write the library's log, but for debugging, to this file too, so that it outlives a crash."""
    global _log_file
    _log_file = descriptor


def library() -> Any:
    """The module llama_cpp, initialised. The library's log is stored here instead of being printed to stderr.

    Raises `RefengineError` if llama-cpp-python is not installed.
    """
    global _log_callback
    try:
        import llama_cpp
    except ImportError as e:
        raise RefengineError(f"llama-cpp-python cannot be imported ({e}); {INSTALL_HINT}") from None
    if _log_callback is None:

        def keep(level: int, text: bytes, user_data: Any) -> None:
            _log_lines.append(text.decode("utf-8", "replace"))
            del _log_lines[:-20]
            if _log_file is not None and level != GGML_LOG_LEVEL_DEBUG:
                os.write(_log_file, text)

        _log_callback = llama_cpp.llama_log_callback(keep)
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()  # before any other call, as llama.h asks
    return llama_cpp


def last_log() -> str:
    """The last line of the library's log."""
    lines = [line.strip() for line in "".join(_log_lines).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _ggml_base() -> ctypes.CDLL:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    candidates = sorted(folder.glob("*ggml-base*"))
    if not candidates:
        raise RefengineError(f"no ggml-base library in {folder}")
    return ctypes.CDLL(str(candidates[0]))


def _read(tensor: _GgmlTensor) -> np.ndarray:
    """A copy of the tensor's values in NumPy's axis order, without leading axes of length 1 (but at least 2 axes)."""
    dtype = np.dtype(_NUMPY_TYPES[tensor.type])
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    extent = dtype.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    buffer = (ctypes.c_char * extent).from_address(tensor.data)
    value = np.ndarray(shape, dtype, buffer=buffer, strides=strides).copy()
    while value.ndim > 2 and value.shape[0] == 1:
        value = value[0]
    return value
