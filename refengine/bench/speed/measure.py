"""What is measured: the sizes, the samples of one size, their spread, and the engine that gives them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

SETTLE_S = 0.1  # the pause before a turn, in which the other engine's threads stop waiting actively and fall asleep


@dataclass(frozen=True)
class Sample:
    """One timed repetition.

    seconds: the time that it took. tokens: how many tokens were computed in it, over all streams.
    positions: for decode, how many positions of the KV cache each stream read in a step, on average.
    """

    seconds: float
    tokens: int
    positions: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class EngineUnderTest(Protocol):
    """An engine with a loaded model. The memory for a size is prepared when the size is first measured.

    The methods raise RefengineError or MemoryError for a size that the engine cannot compute.
    """

    def prompt(self, n: int) -> Sample:
        """Compute a new prompt of `n` tokens up to its first token."""
        ...

    def decode(self, streams: int, depth: int, tokens: int) -> Sample:
        """Take `tokens` steps, each of which computes one token for each of `streams` sequences.

        Before the steps, which alone are timed, each sequence has `depth` tokens in the KV cache; at least one.
        """
        ...

    def step_bytes(self, streams: int, positions: float) -> int:
        """The bytes that a decode step must read at least: the weights once, and the KV cache of every stream.

        They are counted in the types in which this engine keeps them. positions: those that each stream reads.
        Of a mixture of experts, only the experts of one token count.
        """
        ...

    def cache_bytes(self, n_positions: int) -> int:
        """The bytes of a KV cache for `n_positions` positions."""
        ...


@dataclass(frozen=True)
class Prompt:
    """The size of a prompt in tokens."""

    n: int

    streams = 1

    @property
    def label(self) -> str:
        return f"prompt of {self.n:,} tokens"

    @property
    def positions(self) -> int:
        """The positions that the sequence needs in the KV cache."""
        return self.n + 1

    def run(self, engine: EngineUnderTest) -> Sample:
        return engine.prompt(self.n)


@dataclass(frozen=True)
class Decode:
    """A number of sequences that are decoded together, the tokens that each has before, and the number of steps."""

    streams: int
    depth: int
    tokens: int

    @property
    def label(self) -> str:
        return f"decode, {self.streams} {'stream' if self.streams == 1 else 'streams'} at depth {self.depth:,}"

    @property
    def positions(self) -> int:
        """The positions that each sequence needs in the KV cache."""
        return max(self.depth, 1) + self.tokens + 1

    def run(self, engine: EngineUnderTest) -> Sample:
        return engine.decode(self.streams, self.depth, self.tokens)


Size = Prompt | Decode


@dataclass(frozen=True)
class Spread:
    """The median, the lowest and the highest of some values."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        listed = list(values)
        return Spread(statistics.median(listed), min(listed), max(listed))

    @property
    def width(self) -> float:
        """The distance from the lowest to the highest value."""
        return self.highest - self.lowest


@dataclass(frozen=True)
class Measurement:
    """The samples of one engine for one size, in the order in which they were taken."""

    size: Size
    samples: tuple[Sample, ...]

    @property
    def rate(self) -> Spread:
        """Tokens per second, over all streams."""
        return Spread.of(sample.rate for sample in self.samples)

    @property
    def milliseconds(self) -> Spread:
        """Of a prompt: the time to its first token. Of decode: the time of one step."""
        steps = self.size.tokens if isinstance(self.size, Decode) else 1
        return Spread.of(1e3 * sample.seconds / steps for sample in self.samples)

    @property
    def positions(self) -> float:
        """The mean number of KV cache positions that each stream read in a step."""
        return statistics.fmean(sample.positions for sample in self.samples)


def ratios(ours: Measurement, theirs: Measurement) -> list[float]:
    """How many times as many tokens per second we computed as they did, for each pair of neighbouring samples."""
    return [a.rate / b.rate for a, b in zip(ours.samples, theirs.samples, strict=True)]


def measure(
    engines: Sequence[EngineUnderTest],
    size: Size,
    rounds: int,
    pause: Callable[[float], None] = time.sleep,
) -> list[Measurement]:
    """Measure a size on every engine in turns (A B A B …), after one turn each that does not count."""
    samples: list[list[Sample]] = [[] for _ in engines]
    for number in range(rounds + 1):
        for engine, taken in zip(engines, samples, strict=True):
            pause(SETTLE_S)
            sample = size.run(engine)
            if number > 0:  # the first turn allocates, compiles and fills the cache
                taken.append(sample)
    return [Measurement(size, tuple(taken)) for taken in samples]
