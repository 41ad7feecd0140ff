"""The state of a decode step's rows, on the device and mirrored on the host.

At its end, a step advances the state on the device: the sampled token is fed next, at the next position. Before a step
that was not launched ahead, `update` compares the requested state with the mirror and uploads only the differences,
which is nothing while the same sequences continue. Independent of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.errors import KernelError

NO_ROW = -1  # the position of a row without a sequence


@dataclass(slots=True)  # not frozen, because that takes longer, and each token makes one
class DecodeRow:
    """The state of a sequence before a step.

    key: identifies the sequence; while it stays in its row, its history only grows. token: the id to feed, the last of
    `history`. position: its position, which is also the number of positions in the cache. block_table: blocks that
    include `position`. params: temperature, top_p, min_p, repetition_penalty and top_k as in `SamplingParams`.
    seed, index: of the token to be sampled.
    """

    key: object
    token: int
    position: int
    block_table: list[int]
    params: Any
    seed: int
    index: int
    history: Sequence[int]


class DecodeState:
    """The state of all rows, on the device and on the host.

    arrays: ids, positions (max_batch,) int32, tables (max_batch, most blocks) int32, and reals, whole and history as in
    sampling.cu.
    """

    def __init__(self, xp: Any, arrays: dict[str, Array], n_vocab: int, n_positions: int, block_size: int) -> None:
        self._xp, self._n_vocab, self._n_positions, self._block_size = xp, n_vocab, n_positions, block_size
        self._arrays = arrays
        n = len(arrays["ids"])
        # What the device had after the last update, `_n_steps` steps ago. `_tokens`: the ids that it feeds next.
        self._mirror: dict[str, np.ndarray] = {
            "ids": np.zeros(n, np.int32),
            "positions": np.full(n, NO_ROW, np.int32),
            "reals": np.tile(np.array([0.0, 1.0, 0.0, 1.0]), (n, 1)),
            "whole": np.zeros((n, 4), np.int64),
        }
        self._rows: list[DecodeRow] = []
        self._lengths: list[int] = []  # of the rows' histories
        self._tokens: list[int] = []
        self._n_steps = 0
        self._known = False  # whether the mirror is what the device has
        self._keys: list[object] = [None] * n
        self._tables: list[list[int]] = [[] for _ in range(n)]
        self.n_uploads = 0  # number of uploads so far, for tests

    def places(self, rows: Sequence[DecodeRow]) -> list[int] | None:
        """The places of rows on the device, if it has all of them as they are requested, in this order; else None.

        A block table may have grown.
        """
        places, at, n = [], 0, len(self._rows)
        for row in rows:
            while at < n and not self._has(at, row):
                at += 1
            if at == n:
                return None
            places.append(at)
            at += 1
        return places

    def update(self, rows: Sequence[DecodeRow]) -> None:
        """Set the device's state to `rows`; further rows have no sequence. Raises KernelError for invalid rows."""
        for i, row in enumerate(rows):
            self._check(i, row, row.position)
        if self._known and len(rows) == len(self._rows) and self.places(rows) is not None:
            self._upload_tables(rows)
            return
        self._settle()
        requested = {name: array.copy() for name, array in self._mirror.items()}
        requested["positions"][len(rows) :] = NO_ROW
        lengths = [len(r.history) if r.params.repetition_penalty != 1.0 else 0 for r in rows]
        if rows:
            n, params = len(rows), [row.params for row in rows]
            requested["ids"][:n] = [row.token for row in rows]
            requested["positions"][:n] = [row.position for row in rows]
            requested["reals"][:n] = [(p.temperature, p.top_p, p.min_p, p.repetition_penalty) for p in params]
            whole = [(r.params.top_k, r.seed, r.index, length) for r, length in zip(rows, lengths, strict=True)]
            requested["whole"][:n] = np.array(whole, np.uint64).view(np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            self._history(i, row, length)
            self._keys[i] = row.key
        self._upload_tables(rows)
        for name, array in requested.items():
            if not self._known or not np.array_equal(array, self._mirror[name]):
                self._upload(name, slice(None), array)
                self._mirror[name] = array
        self._rows, self._lengths, self._tokens = list(rows), lengths, [row.token for row in rows]
        self._known = True

    def reach_next(self, rows: Sequence[DecodeRow]) -> None:
        """Upload the blocks of the positions after those of `rows`. Raises KernelError if a block table lacks one."""
        for i, row in enumerate(rows):
            self._check(i, row, row.position + 1)
        self._upload_tables(rows)

    def advanced(self, drawn: np.ndarray) -> None:
        """Advance the mirror after a step, as the device has done. drawn: the step's result (n, 3)."""
        self._tokens = np.maximum(drawn[:, 0], 0).tolist()
        self._n_steps += 1

    def forget(self) -> None:
        """Nothing is known of the device's state, because a step has failed: the next update uploads everything."""
        self._rows, self._n_steps, self._known = [], 0, False
        self._keys = [None] * len(self._keys)
        self._tables = [[] for _ in self._tables]

    def _has(self, i: int, row: DecodeRow) -> bool:
        """Whether row i on the device is as requested. Its block table may be longer."""
        held, table = self._rows[i], self._tables[i]
        return (
            row.key == held.key
            and row.position == held.position + self._n_steps
            and row.index == held.index + self._n_steps
            and row.token == self._tokens[i]
            and row.seed == held.seed
            and (row.params is held.params or row.params == held.params)
            and (row.params.repetition_penalty == 1.0 or len(row.history) == self._lengths[i] + self._n_steps)
            and row.block_table[: len(table)] == table
        )

    def _settle(self) -> None:
        """Apply all steps since the last update to the mirror."""
        active = slice(len(self._rows))
        self._mirror["ids"][active] = self._tokens[active]
        self._mirror["positions"][active] += self._n_steps
        whole = self._mirror["whole"][active]
        whole[:, 2] += self._n_steps
        penalised = self._mirror["reals"][active, 3] != 1.0
        whole[:, 3] = np.minimum(whole[:, 3] + self._n_steps * penalised, self._arrays["history"].shape[1])
        self._rows, self._n_steps = [], 0

    def _upload_tables(self, rows: Sequence[DecodeRow]) -> None:
        for i, row in enumerate(rows):
            if self._tables[i] != row.block_table:
                self._tables[i] = list(row.block_table)
                self._upload("tables", (i, slice(len(row.block_table))), np.array(self._tables[i], np.int32))

    def _check(self, i: int, row: DecodeRow, position: int) -> None:
        """Raises KernelError if the row is invalid, or would be at this position."""
        most = self._n_positions
        if not 0 <= position < most or len(row.history) > most + 1:
            raise KernelError(f"decode row {i}: position {position}, {len(row.history)} ids; {most} positions fit")
        if not 0 <= row.token < self._n_vocab:
            raise KernelError(f"decode row {i}: id {row.token} is outside the vocabulary of {self._n_vocab}")
        covered = len(row.block_table) * self._block_size
        if not position < covered <= self._arrays["tables"].shape[1] * self._block_size:
            raise KernelError(f"decode row {i}: position {position}, and a block table of {covered} positions")

    def _history(self, i: int, row: DecodeRow, n: int) -> None:
        known = self._keys[i] is row.key or self._keys[i] == row.key
        if not n or (known and self._mirror["whole"][i, 3] == n):
            return
        ids = np.asarray(row.history, np.int64)
        if not 0 <= ids.min() <= ids.max() < self._n_vocab:
            raise KernelError(f"decode row {i}: ids {ids.min()} to {ids.max()} in its history, of {self._n_vocab}")
        self._upload("history", (i, slice(n)), ids.astype(np.int32))

    def _upload(self, name: str, where: Any, values: np.ndarray) -> None:
        self.n_uploads += 1
        place = self._arrays[name][where]
        if self._xp is np:
            place[...] = values
        else:
            place.set(np.ascontiguousarray(values))
