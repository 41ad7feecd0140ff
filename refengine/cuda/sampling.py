"""Drawing tokens on the device: the twin of `engine.sampling.draw`, for several rows at once.

`sample_rows` takes everything from the host; `StepSampler` has it on the device and leaves it ready for the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.memory import Layout
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError, RefengineError

_PROBLEMS = ("", "is NaN: the forward pass went wrong", "is +Inf: the forward pass overflowed", "")


def sample_rows(
    xp: Any,
    kernels: Kernels,
    logits: Array,
    params: Sequence[Any],
    histories: Sequence[Sequence[int]],
    seeds: Sequence[int],
    indices: Sequence[int],
) -> Array:
    """The token drawn from each row of logits (n_rows, n_vocab): (n_rows, 3) int32 on the device, see `checked_tokens`.

    params: `SamplingParams` of each row; histories: ids that the repetition penalty looks at; seeds, indices: uint64.
    Raises KernelError for numbers of rows that differ, and ids outside the vocabulary.
    """
    n_rows, n_vocab = logits.shape
    given = (len(params), len(histories), len(seeds), len(indices))
    if given != (n_rows,) * 4:
        raise KernelError(f"sampling: {n_rows} rows, and {given} params, histories, seeds and indices")
    needed = [h if p.repetition_penalty != 1.0 else () for p, h in zip(params, histories, strict=True)]
    longest = max(1, *map(len, needed))
    history = np.zeros((n_rows, longest), np.int32)
    for row, ids in enumerate(needed):
        history[row, : len(ids)] = ids
    if history.min() < 0 or history.max() >= n_vocab:
        raise KernelError(f"sampling: ids {history.min()} to {history.max()} in a history, of {n_vocab} that there are")
    reals = np.array([(p.temperature, p.top_p, p.min_p, p.repetition_penalty) for p in params])
    whole = np.array(
        [(p.top_k, s, i, len(h)) for p, s, i, h in zip(params, seeds, indices, needed, strict=True)], np.uint64
    ).view(np.int64)
    values, weights = xp.empty((n_rows, n_vocab), xp.float64), xp.empty((n_rows, n_vocab), xp.uint64)
    out = xp.empty((n_rows, 3), xp.int32)
    there = [xp.asarray(a) for a in (reals, whole, history)]
    arguments = [logits, *there, values, weights, out, np.int32(n_vocab), np.int32(longest)]
    threads = 1024 if kernels.place == "cuda" else 64
    kernels.launch("sampling", "sample_f32", (n_rows,), threads, arguments)
    return out


class StepSampler:
    """The tokens drawn from rows of logits, and the rows' state moved on by them, in three launches; see draw.cu."""

    BINS = 2048  # of draw.cu

    def __init__(self, kernels: Kernels, n_vocab: int, longest: int) -> None:
        """longest: ids that a history has room for."""
        self._kernels, self._n_vocab, self._longest = kernels, n_vocab, longest
        on_gpu = kernels.place == "cuda"
        self._n_parts, self._threads, self._most_threads = (64, 256, 1024) if on_gpu else (3, 64, 64)

    def want(self, layout: Layout, n: int) -> None:
        """The arrays that `launch` takes, for up to n rows: state (reals, whole, history), results (drawn), space."""
        layout.want("reals", n, 4, dtype=np.float64)
        layout.want("whole", n, 4, dtype=np.int64)
        layout.want("history", n, self._longest, dtype=np.int32)
        layout.want("drawn", n, 3, dtype=np.int32)
        layout.want("values", n, self._n_vocab, dtype=np.float64)
        layout.want("keys", n, self._n_parts, dtype=np.uint64)
        layout.want("marks", n, self._n_parts, 3, dtype=np.int32)
        layout.want("counts", n, self.BINS, dtype=np.uint32)
        layout.want("masses", n, self.BINS + 1, dtype=np.uint64)

    def launch(self, n: int, logits: Array, b: dict[str, Array]) -> None:
        """Into b["drawn"], as `sample_rows` gives it. b: the arrays of `want`; ids, positions (n_rows,) int32."""
        launch, n_parts = self._kernels.launch, self._n_parts
        n_vocab, longest = np.int32(self._n_vocab), np.int32(self._longest)
        state = [b["reals"], b["whole"], b["history"], b["positions"]]
        bins = [b["counts"], b["masses"]]
        arguments = [logits, *state, b["values"], b["keys"], b["marks"], *bins, n_vocab, longest]
        launch("draw", "scan_f32", (n_parts, n), self._threads, arguments, overlap=True)
        arguments = [logits, b["reals"], b["positions"], b["values"], b["keys"], b["marks"], *bins, n_vocab]
        launch("draw", "weigh_f32", (n_parts, n), self._threads, arguments, overlap=True)
        arguments = [logits, b["reals"], b["values"], b["keys"], b["marks"], *bins, b["drawn"]]
        arguments += [b["ids"], b["positions"], b["whole"], b["history"], n_vocab, np.int32(n_parts), longest]
        launch("draw", "draw_f32", (n,), self._most_threads, arguments, overlap=True)


def checked_tokens(out: np.ndarray) -> list[int]:
    """Tokens of `sample_rows`, on the host. Raises RefengineError for unusable logits, as `engine.sampling.draw`."""
    for row, (_, problem, where) in enumerate(out.tolist()):
        if problem == 3:
            raise RefengineError(f"row {row}: all logits are -Inf: no token can be drawn")
        if problem:
            raise RefengineError(f"row {row}: logits[{where}] {_PROBLEMS[problem]}; trace the model to find where")
    return [int(token) for token in out[:, 0]]
