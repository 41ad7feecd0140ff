"""The Python API: `load` opens a model, `generate` yields the tokens that follow a prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refengine.cuda import open_kernels
from refengine.device import Device, MemoryAccount, open_device
from refengine.engine.engine import single_sequence
from refengine.engine.generation import Token
from refengine.engine.kernel_runner import KernelRunner
from refengine.engine.runner import ArrayRunner
from refengine.engine.sampling import SamplingParams
from refengine.errors import RequestError
from refengine.gguf.file import GGUFFile
from refengine.hub.files import resolve
from refengine.model import PACKAGED_MODEL, Model
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.ops import Ops, profile
from refengine.ops.dequant import Dequantized
from refengine.tokenizer import load_tokenizer
from refengine.weights import ArrayPlacement, TensorSpec, Weights, check_tensors, load_weights


def load(
    path: str | os.PathLike[str] | GGUFFile | None = None,
    device: str = "cpu",
    numerics: str | None = None,
    *,
    kv_type: str | None = None,
    n_ctx: int | None = None,
    cpu_cache_mb: int | None = None,
    attention: str = "flash",
    progress: Callable[[int, int], None] | None = None,
    copied: bool = False,
    copy_chunk_kb: int = 1024,
) -> Model:
    """Open a GGUF file (for a split file, its first part) and load its tensors onto a device.

    path:         None opens the packaged model, which writes haiku. A string may also name a model on the hub, which is
                  downloaded into the hub's cache: `hf:OWNER/REPO[@REVISION][:QUANT or FILE.gguf]`. A GGUFFile that is
                  already open is used directly; the model keeps it open.
    device:       `cpu`, `cuda`, `cuda:N`, `auto`; `host` runs the CUDA kernels on the CPU, for tests and debuggers.
    numerics:     `exact` (float32), `exact64`, `llamacpp`, `fast`; default: fast on cuda and host, else exact. On a
                  GPU, fast uses raw kernels and weights as stored; all other profiles use array code.
    kv_type:      the type of the KV cache, `f16`, `f32` or `f64`, instead of the profile's.
    n_ctx:        the maximum sequence length in tokens (default: the model's context length).
    cpu_cache_mb: how many MiB of dequantised weights to keep (default: half of the device's memory). On the CPU they
                  are dequantised now, in threads; 0 dequantises at every use.
    attention:    `flash`, or `reference` for array code that writes the score matrix. For comparisons, on kernels only.
    progress:     called with (bytes done, total bytes); bytes that are read and then dequantised count twice.
    copied:       on the CPU, read the weights into memory at once instead of mapping the file, so that later changes of
                  the file do not affect them.
    copy_chunk_kb: the size in KiB of one copy to a GPU, which limits the host memory that loading needs.
    Raises `GGUFError`, `ModelError`, `TokenizerError`, `DeviceError`, `HubError` or `RequestError`.
    """
    if n_ctx is not None and not 1 <= n_ctx < 2**31:
        raise RequestError(f"n_ctx {n_ctx} is outside 1..{2**31 - 1} tokens")
    if cpu_cache_mb is not None and cpu_cache_mb < 0:
        raise RequestError(f"cpu_cache_mb {cpu_cache_mb} must not be negative")
    if not 1 <= copy_chunk_kb <= 1 << 20:
        raise RequestError(f"copy_chunk_kb {copy_chunk_kb} is outside 1..{1 << 20} KiB")
    if attention not in ("flash", "reference"):
        raise RequestError(f"attention {attention!r}: choose flash or reference")
    opened = open_device(device)
    rounding = profile(numerics or ("exact" if opened.name == "cpu" else "fast"), kv_type)
    if opened.name == "host" and not rounding.as_kernels:
        raise RequestError(f"device host runs the CUDA kernels, which need numerics fast; use cpu for {rounding.name}")
    gguf = path if isinstance(path, GGUFFile) else GGUFFile(PACKAGED_MODEL if path is None else resolve(path))
    config = read_config(gguf)
    if n_ctx is not None and n_ctx > config.n_ctx_train and config.rope is None:
        raise RequestError(f"n_ctx {n_ctx}: {config.arch} has only {config.n_ctx_train} learned positions")
    tokenizer = load_tokenizer(gguf)
    architecture = BY_ARCHITECTURE[config.arch]
    specs = architecture.tensors(config)
    dequantized: Dequantized | None = None
    if rounding.as_kernels and opened.name != "cpu":
        check_tensors(gguf, specs)
        kernels = open_kernels(opened, gguf.tensors.values(), attention, copy_chunk_kb << 10)
        ops: Any = kernels.ops
        memory: MemoryAccount | None = kernels.memory
        make_runner: Any = KernelRunner
        with kernels.memory.workspace():
            weights = load_weights(gguf, specs, config.n_layer, kernels.uploader, progress)
        kernels.memory.trim()
    else:
        cache_bytes = default_cache_bytes(opened) if cpu_cache_mb is None else cpu_cache_mb << 20
        ops, memory, make_runner = Ops(opened.xp, rounding, cache_bytes), None, ArrayRunner
        place = ArrayPlacement(opened.xp, copied, copy_chunk_kb << 10)
        if opened.xp is np and cache_bytes:
            weights, dequantized = _load_dequantized(gguf, specs, config.n_layer, place, ops, progress)
        else:
            weights = load_weights(gguf, specs, config.n_layer, place, progress)
    return Model(
        gguf,
        config,
        tokenizer,
        weights,
        ops,
        opened,
        n_ctx,
        make_runner=make_runner,
        memory=memory,
        dequantized=dequantized,
    )


def _load_dequantized(
    gguf: GGUFFile,
    specs: Mapping[str, TensorSpec],
    n_layer: int,
    place: ArrayPlacement,
    ops: Ops,
    progress: Callable[[int, int], None] | None,
) -> tuple[Weights, Dequantized]:
    """Load the weights and fill the cache of `ops`. For `progress`, each of the two counts as the file's bytes."""
    report = progress or (lambda done, total: None)
    n_bytes = sum(info.n_bytes for info in gguf.tensors.values())
    weights = load_weights(gguf, specs, n_layer, place, lambda done, _: report(done, 2 * n_bytes))
    dequantized = ops.cache.fill(
        weights.products(),
        ops.numerics.sum_dtype,
        lambda done, total: report(n_bytes + n_bytes * done // total, 2 * n_bytes),
    )
    report(2 * n_bytes, 2 * n_bytes)  # also if nothing was dequantised
    return weights, dequantized


def default_cache_bytes(device: Device) -> int:
    """Half of the device's memory in bytes; for the CPU, half of the machine's memory."""
    if device.xp is not np:
        return int(device.xp.cuda.runtime.memGetInfo()[1]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def generate(model: Model, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Token]:
    """Yields the tokens that follow a prompt (text, or token ids that are used unchanged), one by one.

    `Token.text` is the text to print: whole code points, without any part of a stop string. The iterator ends after an
    end-of-generation token, a stop string, `params.max_tokens` tokens or at the end of the context; `Token.stop_reason`
    of the last token says why. Raises `RequestError` for a prompt or parameters that do not fit the model.
    """
    engine, generation = single_sequence(model, model.prompt_ids(prompt), params)
    try:
        yield from engine.tokens(generation)
    finally:
        engine.free(generation)
