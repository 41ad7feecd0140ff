"""Compares a run with an earlier one: which sizes became slower by more than both runs vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refengine.bench.speed.measure import Sample, Spread
from refengine.bench.speed.record import Record, key
from refengine.errors import RequestError

SETTINGS = ("device", "threads", "numerics", "chunk")  # which a comparison says if they differ
ENOUGH = 2  # samples; one has no spread


@dataclass(frozen=True)
class Change:
    """refengine's tokens per second for one size, before and now."""

    model: str
    label: str
    before: Spread
    now: Spread

    @property
    def ratio(self) -> float:
        """The median now, by the median before."""
        return self.now.median / self.before.median

    @property
    def is_slower(self) -> bool:
        """Whether the median has fallen by more than the two spreads, from lowest to highest, together."""
        return self.before.median - self.now.median > self.before.width + self.now.width

    @property
    def text(self) -> str:
        values = " to ".join(f"{s.median:,.1f} ({s.lowest:,.1f}–{s.highest:,.1f})" for s in (self.before, self.now))
        return f"{self.model}: {self.label}: {values} tokens/s, {self.ratio:.2f} times as fast"


@dataclass(frozen=True)
class Comparison:
    """changes: of the sizes that both runs have. remarks: what was not compared, and what differs between the runs."""

    changes: tuple[Change, ...]
    remarks: tuple[str, ...]

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.is_slower]


def against(old: Record, new: Record) -> Comparison:
    """Compare refengine's speeds in two runs. Raises RequestError if they have no size in common."""
    was, is_now = old["settings"], new["settings"]
    remarks = [
        *_different(old, new, ("machine", "card")),
        *_different(was, is_now, SETTINGS),
        *_different(was["sizes"], is_now["sizes"], ("tokens",)),
    ]
    now, changes = _sizes(new), []
    for place, (label, before) in _sizes(old).items():
        if place not in now:
            remarks.append(f"{place[0]}: {label} is only in the earlier run")
        elif min(len(before), len(now[place][1])) < ENOUGH:
            remarks.append(f"{place[0]}: {label} has a single sample, which has no spread: not compared")
        else:
            changes.append(Change(place[0], label, Spread.of(before), Spread.of(now[place][1])))
    if not changes:
        raise RequestError(f"the earlier run has nothing to compare with: {'; '.join(remarks) or 'it is empty'}")
    return Comparison(tuple(changes), tuple(remarks))


def _sizes(record: Record) -> dict[tuple[Any, ...], tuple[str, list[float]]]:
    """The label and refengine's tokens per second, by model and size."""
    return {
        (model["model"], *key(size)): (
            size["label"],
            [Sample(**sample).rate for sample in size["engines"]["refengine"]["samples"]],
        )
        for model in record["models"]
        for size in model["measurements"]
    }


def _different(old: Record, new: Record, names: Sequence[str]) -> list[str]:
    """What differs between two runs, of the things with these names."""
    pairs = [(name, old.get(name), new.get(name)) for name in names]
    return [f"{name}: {before} before, {now} now" for name, before, now in pairs if before != now]
