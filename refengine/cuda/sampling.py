"""Samples tokens on the device for rows whose state is on the host. Gives the same tokens as `engine.sampling.draw`.

A decode step keeps the rows' state on the device and uses the same launches (`cuda.kernels.sampling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.kernels.sampling import Sampler, allocated
from refengine.cuda.runtime.launch import Kernels
from refengine.errors import KernelError, RefengineError

_PROBLEMS = {1: "is NaN: the forward pass went wrong", 2: "is +Inf: the forward pass overflowed"}  # of sampling.cu


def sample_rows(
    xp: Any,
    kernels: Kernels,
    logits: Array,
    params: Sequence[Any],
    histories: Sequence[Sequence[int]],
    seeds: Sequence[int],
    indices: Sequence[int],
    space: Mapping[str, Array] | None = None,
) -> Array:
    """Sample a token from each row of logits (n_rows, n_vocab); (n_rows, 3) int32 on the device, see `checked_tokens`.

    params: `SamplingParams` of each row; histories: the ids for the repetition penalty; seeds, indices: uint64. space:
    arrays of at least as many rows to use as work space, as `DecodeStep.sampling_space` has them; None allocates them.
    Raises KernelError if the numbers of rows differ, and for ids outside the vocabulary.
    """
    n_rows, n_vocab = logits.shape
    counts = (len(params), len(histories), len(seeds), len(indices))
    if counts != (n_rows,) * 4:
        raise KernelError(f"sampling: {n_rows} rows, but {counts} params, histories, seeds and indices")
    needed = [h if p.repetition_penalty != 1.0 else () for p, h in zip(params, histories, strict=True)]
    longest = max(1, *map(len, needed))
    history = np.zeros((n_rows, longest), np.int32)
    for row, ids in enumerate(needed):
        history[row, : len(ids)] = ids
    if history.min() < 0 or history.max() >= n_vocab:
        raise KernelError(f"sampling: ids {history.min()} to {history.max()} in a history, allowed 0 to {n_vocab - 1}")
    reals = np.array([(p.temperature, p.top_p, p.min_p, p.repetition_penalty) for p in params])
    whole = np.array(
        [(p.top_k, s, i, len(h)) for p, s, i, h in zip(params, seeds, indices, needed, strict=True)], np.uint64
    ).view(np.int64)
    sampler = Sampler(kernels, n_vocab, longest)
    b = allocated(sampler, n_rows, xp.empty, space or {})
    b |= {"reals": xp.asarray(reals), "whole": xp.asarray(whole), "history": xp.asarray(history)}
    b["positions"].fill(0)
    sampler.draw(n_rows, logits, b)
    return b["drawn"]


def checked_tokens(out: np.ndarray) -> list[int]:
    """The tokens from the result of `sample_rows` on the host. Raises RefengineError for NaN or infinite logits."""
    return [checked_token(values, row) for row, values in enumerate(out.tolist())]


def checked_token(values: Sequence[int], row: int = 0) -> int:
    """The token of one row of the result. Raises the errors of `checked_tokens`."""
    token, problem, where = values
    if problem == 3:
        raise RefengineError(f"row {row}: all logits are -Inf: no token can be sampled")
    if problem:
        raise RefengineError(f"row {row}: logits[{where}] {_PROBLEMS[problem]}; trace the model to find where")
    return token
