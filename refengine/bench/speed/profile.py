"""The time of a decode step by kernel, or by operation of the array code.

On kernels, a CUDA event before and after each launch measures it; each kernel then runs alone and without a graph. On
arrays, the operations of `ops` are timed, on a GPU with events as well. A profiled step takes longer than another one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from refengine.bench.speed.traffic import expert_share
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Constants, Struct
from refengine.gguf.file import TensorInfo

OPERATIONS = {
    *("embedding", "rows", "linear", "linear_experts", "rms_norm", "layer_norm", "rope_angles", "rope_neox"),
    *("rope_norm", "kv_append", "attention", "swiglu", "swiglu_clamped", "gelu", "top_experts", "take_experts"),
    *("row_soft_max", "sum_experts"),
}
# Kernel files whose launches read or write every byte of their arguments once, and how many of the first arguments
# are weights. Of the arguments of the others (caches, tables) a launch reads only a part.
PRODUCTS = {"matmul": 1, "matmul_f32": 1, "few_rows": 3, "one_row": 3}
WHOLE_ARGUMENTS = PRODUCTS | {"norm": 0, "activation": 0, "quantize_rows": 0}


@dataclass(frozen=True)
class ProfileRow:
    """One kernel or operation in a step.

    calls: how often it ran. seconds: all of its calls together. n_bytes: what they must read and write at least, or
    None if that is not known.
    """

    name: str
    calls: float
    seconds: float
    n_bytes: float | None


@dataclass(frozen=True)
class Profile:
    """A decode step. seconds: the whole of it. rows: the longest first. rest: the name of what no row has."""

    seconds: float
    rows: tuple[ProfileRow, ...]
    by: str  # `kernel` or `operation`
    rest: str


class Profiler:
    """Collects timed calls. xp: the array module, which decides how time is measured. by: see `Profile`."""

    def __init__(self, xp: Any, by: str) -> None:
        self._xp, self._by = xp, by
        self._calls: list[tuple[str, Any, Any, float | None]] = []
        self._started = 0.0

    def timed(self, name: str, n_bytes: float | None, call: Callable[[], Any]) -> Any:
        """Run a call and remember its time; returns its result."""
        start = self._mark()
        result = call()
        self._calls.append((name, start, self._mark(), n_bytes))
        return result

    def begin(self) -> None:
        """Forget all calls so far. The steps that follow are profiled."""
        self._wait()
        self._calls.clear()
        self._started = time.perf_counter()

    def end(self, steps: int) -> Profile:
        """The profile of one step, the mean of `steps` steps since `begin`."""
        self._wait()
        seconds = (time.perf_counter() - self._started) / steps
        totals: dict[str, tuple[int, float, float | None]] = {}
        for name, start, stop, n_bytes in self._calls:
            calls, spent, moved = totals.get(name, (0, 0.0, 0.0))
            known = None if n_bytes is None or moved is None else moved + n_bytes
            totals[name] = (calls + 1, spent + self._between(start, stop), known)
        rows = [
            ProfileRow(name, calls / steps, spent / steps, None if moved is None else moved / steps)
            for name, (calls, spent, moved) in totals.items()
        ]
        rows.sort(key=lambda row: -row.seconds)
        rest = "launches from Python, scheduling" if self._by == "kernel" else "additions, sampling, scheduling"
        return Profile(seconds, tuple(rows), self._by, rest)

    def _mark(self) -> Any:
        if self._xp is np:
            return time.perf_counter()
        event = self._xp.cuda.Event()
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        """The seconds between two marks."""
        return float(stop - start if self._xp is np else self._xp.cuda.get_elapsed_time(start, stop) / 1e3)

    def _wait(self) -> None:
        if self._xp is not np:
            self._xp.cuda.get_current_stream().synchronize()


class TimedKernels(Kernels):
    """Kernels whose launches are timed. bytes_of: the bytes of a launch, from its file, name, arguments and tensor."""

    def __init__(self, kernels: Kernels, profiler: Profiler, bytes_of: Callable[..., float | None]) -> None:
        super().__init__(kernels.place)
        self._inner, self._profiler, self._bytes_of = kernels, profiler, bytes_of

    def module(self, file: str, constants: Constants = ()) -> Any:
        return self._inner.module(file, constants)

    def launch(
        self,
        file: str,
        kernel: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        overlap: bool = False,
        *,
        what: str = "",
        constants: Constants = (),
    ) -> None:
        """See `Kernels.launch`; overlap is ignored, so that each time belongs to one kernel."""
        launch = super().launch
        self._profiler.timed(
            f"{kernel} {tensor_kind(what)}".strip(),
            self._bytes_of(file, kernel, arguments, what),
            lambda: launch(file, kernel, grid, block, arguments, shared_bytes, what=what, constants=constants),
        )


class TimedOps:
    """Array operations that are timed; everything else is that of `ops`."""

    def __init__(self, ops: Any, profiler: Profiler, bytes_of: Callable[..., float | None]) -> None:
        self._ops, self._profiler, self._bytes_of = ops, profiler, bytes_of

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        if name not in OPERATIONS:
            return value

        def timed(*arguments: Any, **named: Any) -> Any:
            tensor = arguments[1].name if name in ("linear", "linear_experts") else ""
            label = f"{name} {tensor_kind(tensor)}".strip()
            return self._profiler.timed(label, self._bytes_of(name, tensor), lambda: value(*arguments, **named))

        return timed


@contextmanager
def profiled(model: Any, resident_bytes: Callable[[TensorInfo], float], cache_bytes: float) -> Iterator[Profiler]:
    """While the context is active, kernels or array operations of the model are timed. Make the engine inside it.

    resident_bytes: the bytes that a product reads of a tensor. cache_bytes: those that a step reads of the KV cache.
    """
    ops, config = model.ops, model.config
    of_attention = cache_bytes / int(config.n_layer)

    def of_launch(file: str, kernel: str, arguments: Sequence[Any], what: str) -> float | None:
        if kernel.startswith("attention_step_"):
            return of_attention
        if file not in WHOLE_ARGUMENTS:
            return None
        n_weights, share = WHOLE_ARGUMENTS[file], expert_share(what, config)
        sizes = [_n_bytes(argument) for argument in arguments]
        return float(share * sum(sizes[:n_weights]) + sum(sizes[n_weights:]))

    def of_operation(name: str, tensor: str) -> float | None:
        if name == "attention":
            return of_attention
        if not tensor:
            return None
        return resident_bytes(model.gguf.tensors[tensor]) * expert_share(tensor, config)

    if hasattr(ops, "kernels"):
        kernels, profiler = ops.kernels, Profiler(ops.xp, "kernel")
        ops.kernels = TimedKernels(kernels, profiler, of_launch)
        try:
            yield profiler
        finally:
            ops.kernels = kernels
    else:
        profiler = Profiler(ops.xp, "operation")
        model.ops = TimedOps(ops, profiler, of_operation)
        try:
            yield profiler
        finally:
            model.ops = ops


def tensor_kind(name: str) -> str:
    """`blk.3.ffn_up.weight` → `ffn_up`."""
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


def _n_bytes(argument: Any) -> int:
    """The bytes of an array, or of the arrays of a struct; 0 for numbers and null pointers."""
    if isinstance(argument, Struct):
        return sum(_n_bytes(array) for array in argument.members)
    return int(getattr(argument, "nbytes", 0)) if getattr(argument, "ndim", 0) else 0
