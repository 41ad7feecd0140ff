"""Where a decode step keeps what it computes: places in one arena, planned ahead, the same at every step.

A step asks for buffers in an order that depends on the number of rows alone. `Recorder` notes their sizes and between
which launches each is in use, without a device; `Recorder.plan` finds places for them, so that what is not in use at
the same time may lie at the same place; `Placed` hands them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from refengine.array import Array
from refengine.cuda.memory import Arena, aligned


@dataclass(frozen=True)
class Buffer:
    """Space of a step. index: its number in the order of asking."""

    array: Array
    index: int


class Buffers(Protocol):
    """Hands out the buffers of one step."""

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Space that is in use from the next launch on."""

    def use(self, buffer: Buffer) -> None:
        """The next launch reads or writes it."""

    def launched(self) -> None:
        """A launch was made."""


@dataclass(frozen=True)
class Plan:
    """offsets: of each buffer in the arena, by index. n_bytes: what all of them take together."""

    offsets: tuple[int, ...]
    n_bytes: int


class Recorder:
    """Buffers that have a shape and no memory."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._spans: list[list[int]] = []  # first and last launch that uses each
        self._now = 0

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        self._sizes.append(aligned(prod(shape) * np.dtype(dtype).itemsize))
        self._spans.append([self._now, self._now])
        return Buffer(np.broadcast_to(np.zeros((), dtype), shape), len(self._sizes) - 1)

    def use(self, buffer: Buffer) -> None:
        self._spans[buffer.index][1] = self._now

    def launched(self) -> None:
        self._now += 1

    def plan(self) -> Plan:
        """The lowest free place for each buffer in turn, among those still in use at its first launch."""
        offsets: list[int] = []
        in_use: list[tuple[int, int, int]] = []  # offset, end, last launch; by offset
        most = 0
        for size, (first, last) in zip(self._sizes, self._spans, strict=True):
            in_use = [taken for taken in in_use if taken[2] >= first]
            offset = 0
            for start, end, _ in in_use:
                if offset + size <= start:
                    break
                offset = max(offset, end)
            in_use = sorted([*in_use, (offset, offset + size, last)])
            offsets.append(offset)
            most = max(most, offset + size)
        return Plan(tuple(offsets), most)


class Placed:
    """The buffers of one step, at the places of a plan. rows: as many as the plan was made for."""

    def __init__(self, arena: Arena, offsets: Sequence[int]) -> None:
        self._arena, self._offsets, self._n = arena, offsets, 0

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        array = self._arena.view(self._offsets[self._n], shape, dtype)
        self._n += 1
        return Buffer(array, self._n - 1)

    def use(self, buffer: Buffer) -> None:
        """The plan knows."""

    def launched(self) -> None:
        """The plan knows."""
