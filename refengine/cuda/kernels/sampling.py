"""Samples tokens from rows of logits: bindings of kernels_cu/sampling.cu. All launches overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels

BINS, MOST_LISTED, MOST_OF_PART = 2048, 896, 4095  # as in sampling.cu


WORK_SPACE = ("values", "keys", "marks", "counts", "masses", "listed", "numbers")  # of `Sampler.arrays`


class Sampler:
    """Samples a token from each of several rows, and advances the rows' state by it. Has no arrays itself.

    n_vocab: the width of a row of logits. longest: the maximum number of ids in a row's history.
    """

    def __init__(self, kernels: Kernels, n_vocab: int, longest: int) -> None:
        self._kernels, self._n_vocab, self._longest = kernels, n_vocab, longest
        on_gpu = kernels.place == "cuda"
        self._scan_threads, self._threads = (256, 1024) if on_gpu else (64, 64)
        self._n_blocks, few = (128, 4) if on_gpu else (6, 3)
        self._fewest = max(few, -(-n_vocab // MOST_OF_PART))

    def arrays(self, n: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The arrays, (shape, dtype) by name, that `draw` needs for up to n rows, in addition to ids and positions.

        reals, whole and history are the rows' state, drawn is the result, the others are work space; see sampling.cu.
        """
        return {
            "reals": ((n, 4), np.float64),
            "whole": ((n, 4), np.int64),
            "history": ((n, self._longest), np.int32),
            "drawn": ((n, 3), np.int32),
            "values": ((n, self._n_vocab), np.float64),
            "keys": ((n, max(self._fewest, self._n_blocks)), np.uint64),
            "marks": ((n, max(self._fewest, self._n_blocks), 3), np.int32),
            "counts": ((n, BINS), np.uint32),
            "masses": ((n, BINS + 1), np.uint64),
            "listed": ((n, MOST_LISTED, 3), np.uint64),
            "numbers": ((n, 2), np.int32),
        }

    def draw(self, n: int, logits: Array, b: Mapping[str, Array]) -> None:
        """Sample from rows of logits (n, n_vocab) into b["drawn"]. b: the `arrays`, and ids, positions (n,) int32."""
        n_vocab, longest = self._n_vocab, self._longest
        n_parts = max(self._fewest, self._n_blocks // n)  # of a row
        check_shape("sampling", "the logits' array", logits, (n, n_vocab))

        def launch(kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
            self._kernels.launch("sampling", kernel, grid, threads, arguments, overlap=True)

        state = [b["reals"], b["whole"], b["history"], b["positions"]]
        best, bins = [b["values"], b["keys"], b["marks"]], [b["counts"], b["masses"]]
        launch(
            "scan_f32", (n_parts, n), self._scan_threads, logits, *state, *best, *bins, b["numbers"], n_vocab, longest
        )
        launch("weigh_f32", (n_parts, n), self._threads, logits, b["reals"], b["positions"], *best, *bins, n_vocab)
        lists = [b["listed"], b["numbers"]]
        outputs = [b["drawn"], b["ids"], b["positions"], b["whole"], b["history"]]
        sizes = [n_vocab, n_parts, longest]
        launch("draw_f32", (n_parts, n), self._threads, logits, b["reals"], *best, *bins, *lists, *outputs, *sizes)


def allocated(sampler: Sampler, n: int, empty: Callable[..., Array], space: Mapping[str, Array]) -> dict[str, Array]:
    """The sampler's arrays for n rows, with ids and positions: rows of those that `space` has, the others allocated by
    `empty(shape, dtype)`.
    """
    shapes = sampler.arrays(n) | {"ids": ((n,), np.int32), "positions": ((n,), np.int32)}
    return {name: space[name][:n] if name in space else empty(*given) for name, given in shapes.items()}
