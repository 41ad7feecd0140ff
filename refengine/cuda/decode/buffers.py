"""The buffers of a decode step: they have fixed places in one arena, which are planned ahead.

The order in which a step requests buffers depends only on the number of rows. `Recorder` records, without a device, the
size of each buffer and the launches during which it is in use. `Recorder.plan` finds places for the buffers; those that
are not in use at the same time may have the same place. `Placed` gives the buffers out.
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
    """A buffer of a step. index: its number in the order of requests."""

    array: Array
    index: int


class Buffers(Protocol):
    """Gives out the buffers of one step."""

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """A new buffer, in use from the next launch on."""

    def use(self, buffer: Buffer) -> None:
        """Note that the next launch reads or writes the buffer."""

    def launched(self) -> None:
        """Note that a launch was made."""


@dataclass(frozen=True)
class Plan:
    """The places of a step's buffers. offsets: of each buffer in the arena, by index. n_bytes: their total size."""

    offsets: tuple[int, ...]
    n_bytes: int


class Recorder:
    """Records the use of buffers, which have shapes but no memory."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._spans: list[list[int]] = []  # first and last launch that uses each
        self._now = 0

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        self._sizes.append(aligned(prod(shape) * np.dtype(dtype).itemsize))
        self._spans.append([self._now, self._now])
        return Buffer(shaped(shape, dtype), len(self._sizes) - 1)

    def use(self, buffer: Buffer) -> None:
        self._spans[buffer.index][1] = self._now

    def launched(self) -> None:
        self._now += 1

    def plan(self) -> Plan:
        """Give each buffer, in order, the lowest place that is free at its first launch."""
        offsets: list[int] = []
        in_use: list[tuple[int, int, int]] = []  # offset, end, last launch; by offset
        most = 0
        for size, (first, last) in zip(self._sizes, self._spans, strict=True):
            in_use = [place for place in in_use if place[2] >= first]
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
    """The buffers of one step, at the places of a plan for the same number of rows."""

    def __init__(self, arena: Arena, offsets: Sequence[int]) -> None:
        self._arena, self._offsets, self._n = arena, offsets, 0

    def new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        array = self._arena.view(self._offsets[self._n], shape, dtype)
        self._n += 1
        return Buffer(array, self._n - 1)

    def use(self, buffer: Buffer) -> None:
        """Does nothing: the plan is already made."""

    def launched(self) -> None:
        """Does nothing: the plan is already made."""


def shaped(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array with a shape but no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
