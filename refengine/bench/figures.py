"""A figure: the samples of one measurement, their percentiles and histogram, and whether they meet a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 12
LOG_FROM = 20.0  # above this ratio of the largest to the smallest sample, bins grow geometrically
BAR = 40  # length of the longest bar in characters
PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}


@dataclass(frozen=True)
class Figure:
    """The samples of one measurement.

    judged: the percentile that is compared with the target. inclusive: a value equal to the target passes.
    note: how it was measured.
    """

    id: str
    name: str
    unit: str
    samples: Sequence[float]
    target: float | None = None
    judged: str = "p95"
    inclusive: bool = False
    note: str = ""

    def at(self, percentile: str) -> float | None:
        """The sample at a percentile; None without samples."""
        if not self.samples:
            return None
        return float(np.percentile(np.asarray(self.samples, float), PERCENTILES[percentile], method="inverted_cdf"))

    @property
    def verdict(self) -> str:
        """`pass`, `miss`, or `-` without a target or samples."""
        value = self.at(self.judged)
        if value is None or self.target is None:
            return "-"
        return "pass" if value < self.target or (self.inclusive and value == self.target) else "miss"

    @property
    def target_text(self) -> str:
        if self.target is None:
            return "-"
        sign = "=" if self.inclusive and self.target == 0 else "<=" if self.inclusive else "<"
        return f"{self.judged} {sign} {self.target:g}"

    def histogram(self) -> list[tuple[float, float, int]]:
        """Lower bound, upper bound and count of each bin; empty if all samples are equal."""
        samples = np.asarray(self.samples, float)
        if len(samples) == 0 or samples.min() == samples.max():
            return []
        low, high = float(samples.min()), float(samples.max())
        geometric = low > 0 and high / low > LOG_FROM
        edges = np.geomspace(low, high, BINS + 1) if geometric else np.linspace(low, high, BINS + 1)
        edges[0], edges[-1] = low, high
        counts, _ = np.histogram(samples, edges)
        return [(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]

    def bars(self) -> list[str]:
        """The histogram as lines of text."""
        bins = self.histogram()
        most = max((n for _, _, n in bins), default=1)
        return [f"{a:12.4g} to {b:<12.4g} {'#' * -(-n * BAR // most)} {n}" for a, b, n in bins]

    def json(self) -> dict[str, Any]:
        samples = np.asarray(self.samples, float)
        spread = {} if len(samples) == 0 else {"min": float(samples.min()), "mean": float(samples.mean())}
        return {
            "id": self.id,
            "name": self.name,
            "unit": self.unit,
            "samples": len(samples),
            **{name: self.at(name) for name in PERCENTILES},
            **spread,
            "target": self.target,
            "judged": self.judged,
            "verdict": self.verdict,
            "note": self.note,
            "histogram": self.histogram(),
        }
