"""Traces named tensors: records them, watches for NaN and Inf, stops in the debugger, replaces values.

The forward pass calls `trace(name, il, x)` with every intermediate tensor and continues with the returned
one. Names are llama.cpp's: `Qcur-0` is tensor `Qcur` of layer 0. If llama.cpp's graph uses a name several times
(`Qcur`: product, with bias, after RoPE), the earlier ones have a number, `Qcur-0#0`, `Qcur-0#1`;
the plain name is the last one.

Independent of models, devices and files: an array is any object with `dtype` and slicing.
"""

from __future__ import annotations

import os
import pdb
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from refengine.array import Array
from refengine.errors import TraceError


class Tracer(Protocol):
    """The function that a forward pass calls for each tensor. `il` is None for tensors outside the layers."""

    def __call__(self, name: str, il: int | None, x: Array, occurrence: int | None = None) -> Array: ...


def no_trace(name: str, il: int | None, x: Array, occurrence: int | None = None) -> Array:
    """The tracer that does nothing."""
    return x


def tensor_name(name: str, il: int | None, occurrence: int | None = None) -> str:
    """`("Qcur", 3, 0)` → `Qcur-3#0`; `("result_norm", None, None)` → `result_norm`."""
    base = name if il is None else f"{name}-{il}"
    return base if occurrence is None else f"{base}#{occurrence}"


def to_numpy(x: Array) -> np.ndarray:
    """A NumPy copy of an array on any device."""
    return np.array(x) if isinstance(x, np.ndarray) else np.asarray(x.get())


# Tensors inside attention, whose shape is (n_head, n_tokens, …).
_HEADS_FIRST = ("kq-", "kq_soft_max-", "kq_exp-", "kqv-")


class Trace:
    """A tracer that records, watches, breaks and replaces.

    record:   regular expression; tensors whose full name matches (`re.search`) are copied to `tensors`.
    watch:    stop at the first tensor with NaN or Inf, with a `TraceError` that names it and the index.
    replace:  full name → an array that replaces the tensor, or a function of the tensor. Shapes must be equal.
    on_break: called with the full name and the array instead of opening pdb (for other debuggers and for tests).
    strict:   a breakpoint or replacement whose tensor does not exist is an error before anything is computed.

    If a prompt is fed in several forward passes, `result()` joins their rows.
    """

    def __init__(
        self,
        record: str | None = None,
        *,
        watch: bool = False,
        replace: Mapping[str, ArrayLike | Callable[[Array], ArrayLike]] | None = None,
        breakpoints: Iterable[str] = (),
        on_break: Callable[[str, Array], None] | None = None,
        strict: bool = True,
    ) -> None:
        try:
            self._record = None if record is None else re.compile(record)
        except re.error as e:
            raise TraceError(f"tensor filter {record!r} is not a regular expression: {e}") from None
        self.watch = watch
        self.replace = dict(replace or {})
        self.breakpoints = set(breakpoints)
        self.on_break = on_break
        self._strict = strict
        self.tensors: dict[str, list[np.ndarray]] = {}
        self.seen: dict[str, None] = {}  # full names, in order

    @property
    def wanted(self) -> set[str]:
        """The full names of the tensors that must exist: breakpoints and replacements, if the trace is strict."""
        return self.breakpoints | set(self.replace) if self._strict else set()

    def breakpoint(self, name: str) -> None:
        """Stop in the debugger whenever tensor `name` is computed (`Qcur-3`, or `Qcur-3#0` for an earlier one)."""
        self.breakpoints.add(name)

    def __call__(self, name: str, il: int | None, x: Array, occurrence: int | None = None) -> Array:
        full = tensor_name(name, il, occurrence)
        self.seen[full] = None
        if self._record is not None and self._record.search(full):
            self.tensors.setdefault(full, []).append(to_numpy(x))
        if self.watch:
            self._check_finite(full, x)
        value = self._replaced(full, x) if full in self.replace else x
        if full in self.breakpoints:
            self._break(full, value, sys._getframe(1))  # must be last: the debugger would stop at any call after it
        return value

    def result(self) -> dict[str, np.ndarray]:
        """The recorded tensors by full name. Those of several forward passes are joined along the rows if shapes allow.

        Tensors inside attention (`kq`, `kq_soft_max`, `kqv`) have heads, not rows, along their first axis; those of
        several passes are not joined and named `name@pass`.
        """
        out: dict[str, np.ndarray] = {}
        for name, parts in self.tensors.items():
            if len(parts) == 1:
                out[name] = parts[0]
            elif len({p.shape[1:] for p in parts}) == 1 and not name.startswith(_HEADS_FIRST):
                out[name] = np.concatenate(parts)
            else:
                out.update({f"{name}@{i}": part for i, part in enumerate(parts)})
        return out

    def check_names(self) -> None:
        """Called after a run. Raises `TraceError` if a tensor to break at or to replace has not occurred."""
        check_known(self.wanted, self.seen)

    def _check_finite(self, full: str, x: Array) -> None:
        bad = ~np.isfinite(x)  # CuPy arrays answer NumPy's ufuncs
        if not bool(bad.any()):
            return
        index = tuple(int(i) for i in np.argwhere(to_numpy(bad))[0])
        raise TraceError(
            f"tensor {full} is the first with a non-finite value: {float(x[index])} at {index} of shape "
            f"{tuple(x.shape)} ({int(bad.sum())} in total)"
        )

    def _break(self, full: str, x: Array, frame: Any) -> None:
        hook = os.environ.get("PYTHONBREAKPOINT", "")
        if self.on_break is not None:
            self.on_break(full, x)
            return
        if hook == "0":  # as for breakpoint(): no debugger
            return
        if hook:
            sys.breakpointhook()
            return
        print(
            f"refengine: stopped after {full}, shape {tuple(x.shape)} {x.dtype}; it is the variable that the previous "
            "line has just set (`__return__` at the end of a function)",
            file=sys.stderr,
        )
        pdb.Pdb().set_trace(frame)
        # From Python 3.13 on the debugger stops at the next instruction, which is before the variable is set.
        frame.f_trace_opcodes = False

    def _replaced(self, full: str, x: Array) -> Array:
        new = self.replace[full]
        value = as_array(new(x) if callable(new) else new)
        if tuple(value.shape) != tuple(x.shape):
            raise TraceError(f"replacement of {full} has shape {tuple(value.shape)}, the tensor has {tuple(x.shape)}")
        if isinstance(value, np.ndarray) and not isinstance(x, np.ndarray):
            value = _like(x, value)
        return value.astype(x.dtype, copy=False)


def as_array(value: Any) -> Array:
    """A NumPy or CuPy array unchanged; a list, a torch tensor or another array as a NumPy array."""
    if isinstance(value, np.ndarray) or type(value).__module__.partition(".")[0] == "cupy":
        return value
    if hasattr(value, "detach"):  # torch: detach it from its graph and device; NumPy has no bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def check_known(wanted: Iterable[str], known: Collection[str]) -> None:
    """Raise `TraceError` with the names in `wanted` that are not in `known`."""
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise TraceError(f"no such tensor: {', '.join(unknown)}; this model has {_summary(known)}")


def _like(x: Array, value: np.ndarray) -> Array:
    """A copy of `value` on the device of `x`, which is a CuPy array."""
    out: Any = x.copy().astype(value.dtype)
    out.set(np.ascontiguousarray(value))
    return out


def _summary(names: Iterable[str]) -> str:
    layers = sorted({n for n in names if n.endswith("-0") or "-" not in n})
    return ", ".join(layers) if layers else "no tensors (no forward pass was run)"
