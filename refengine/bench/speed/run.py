"""Measures one model: which sizes fit, the engines in turns, the bandwidth of a copy, and the profile of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from refengine.bench.speed.measure import Decode, EngineUnderTest, Measurement, Prompt, Size, Spread, measure, ratios
from refengine.bench.speed.process import LLAMACPP, REFENGINE, EngineProcess, Refused, Setup
from refengine.bench.speed.profile import Profile
from refengine.errors import RefengineError
from refengine.validate.llamacpp import repack_crashes

CACHE_SHARE = 0.8  # of the free memory that the KV caches of a size may take; the rest is for intermediate arrays
PROFILED_STEPS = 16
IDLE_CPU_SHARE = 0.05  # of a core; an engine that uses more while it waits disturbs the other one


@dataclass(frozen=True)
class Sizes:
    """What is measured. prompts, depths, streams: the values on the axes. tokens: decode steps of a sample."""

    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    streams: tuple[int, ...]
    tokens: int
    rounds: int

    def all(self) -> list[Size]:
        """Every size once. Several streams, and one stream beside them, are decoded at the shortest depth."""
        decodes = [(1, depth) for depth in self.depths] + [(n, min(self.depths)) for n in self.streams]
        prompts = [Prompt(n) for n in dict.fromkeys(self.prompts)]
        return [*prompts, *(Decode(n, depth, self.tokens) for n, depth in dict.fromkeys(decodes))]


ON_CPU = Sizes(prompts=(128, 512), depths=(0, 512), streams=(1, 4, 8), tokens=16, rounds=3)
ON_GPU = Sizes(prompts=(512, 2048), depths=(0, 512, 3500), streams=(1, 8, 32, 64), tokens=128, rounds=5)


@dataclass(frozen=True)
class Settings:
    """How it is measured. compare: whether llama.cpp is measured too. See `process.Setup` for the others."""

    device: str
    sizes: Sizes
    threads: int
    numerics: str | None = None
    chunk: int = 512
    compare: bool = False
    profile: bool = False

    @property
    def engines(self) -> list[str]:
        return [REFENGINE, LLAMACPP] if self.compare else [REFENGINE]


@dataclass(frozen=True)
class LeftOut:
    """A size that was not measured, and why."""

    size: Size
    reason: str


@dataclass(frozen=True)
class Compared:
    """A size on every engine. bytes_of_step: what a step of each engine must read at least; empty for a prompt."""

    size: Size
    by_engine: dict[str, Measurement]
    bytes_of_step: dict[str, int] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """refengine's tokens per second by llama.cpp's, pair by pair; empty without llama.cpp."""
        if LLAMACPP not in self.by_engine:
            return []
        return ratios(self.by_engine[REFENGINE], self.by_engine[LLAMACPP])


@dataclass(frozen=True)
class ProfiledStep:
    """A profile, and the median seconds of a step of the same size without it."""

    size: Decode
    profile: Profile
    unprofiled_s: float


@dataclass
class ModelResult:
    """All results of one model. engines: the facts of each. copy_rates: bytes per second, read and written."""

    path: Path
    engines: dict[str, dict[str, Any]]
    copy_rates: list[float] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    profiles: list[ProfiledStep] = field(default_factory=list)


def run_model(path: Path, settings: Settings, say: Callable[[str], None]) -> ModelResult:
    """Measure a model. say: gets a line for each step. Raises RefengineError if nothing could be measured."""
    with ExitStack() as stack:
        processes: dict[str, EngineProcess] = {}
        for name in settings.engines:
            setup = Setup(name, str(path), settings.device, settings.numerics, settings.chunk, settings.threads)
            if name == LLAMACPP and setup.device == "cpu" and repack_crashes(path, setup.environment):
                say(f"warning: {name} crashes with repacked weights on this processor, and is measured without")
                setup = replace(setup, repack=False)
            say(f"{path.name}: {name} loads it")
            processes[name] = process = stack.enter_context(EngineProcess(setup))
            say(f"{path.name}: {name} has loaded it in {process.facts['load_s']:.1f} s")
        for process in processes.values():
            process.beside = [other for other in processes.values() if other is not process]
        ours = processes[REFENGINE]
        result = ModelResult(path, {name: process.facts for name, process in processes.items()})
        result.copy_rates += ours.copy_rates()
        say(f"a copy reads and writes {Spread.of(result.copy_rates).median / 1e9:.3g} GB/s")
        _measure_sizes(result, settings.sizes, processes, ours.free_memory(), say)
        result.copy_rates += ours.copy_rates()
        for name, process in processes.items():
            usage = process.usage()
            result.engines[name] = {**process.facts, **usage}
            if usage["idle_cpu_share"] > IDLE_CPU_SHARE:
                share = usage["idle_cpu_share"]
                say(f"warning: {name} used {share:.0%} of a core while it waited, which slows the other engine down")
        if settings.profile:
            for compared in to_profile(result.compared):
                say(f"{path.name}: profile of {compared.size.label}")
                result.profiles.append(_profiled(ours, compared))
    return result


def _measure_sizes(
    result: ModelResult,
    sizes: Sizes,
    processes: dict[str, EngineProcess],
    free_bytes: int,
    say: Callable[[str], None],
) -> None:
    n_ctx = int(result.engines[REFENGINE]["n_ctx"])
    for size in sizes.all():
        reason = why_not(size, n_ctx, free_bytes, list(processes.values()))
        if reason is None:
            try:
                found = measure(list(processes.values()), size, sizes.rounds)
            except Refused as e:
                reason = f"{e.engine}: {e}"
        if reason is not None:
            result.left_out.append(LeftOut(size, reason))
            say(f"{result.path.name}: {size.label}: left out: {reason}")
            continue
        compared = Compared(size, dict(zip(processes, found, strict=True)))
        if isinstance(size, Decode):
            for name, process in processes.items():
                positions = compared.by_engine[name].positions
                compared.bytes_of_step[name] = process.step_bytes(size.streams, positions)
        result.compared.append(compared)
        rates = ", ".join(f"{name} {m.rate.median:,.1f} tokens/s" for name, m in compared.by_engine.items())
        ratio = f", ratio {Spread.of(compared.ratios).median:.2f}" if compared.ratios else ""
        say(f"{result.path.name}: {size.label}: {rates}{ratio}")
    if not result.compared:
        reasons = "; ".join(f"{left.size.label}: {left.reason}" for left in result.left_out)
        raise RefengineError(f"{result.path}: no size could be measured: {reasons}")


def why_not(size: Size, n_ctx: int, free_bytes: int, engines: Sequence[EngineUnderTest]) -> str | None:
    """Why a size does not fit the model's context, or the memory that is free; None if it fits."""
    if size.positions > n_ctx:
        return f"it needs {size.positions:,} positions, and the model's context has {n_ctx:,}"
    needed = sum(engine.cache_bytes(size.streams * size.positions) for engine in engines)
    if needed > CACHE_SHARE * free_bytes:
        return f"its KV cache needs {needed / 1e6:,.0f} MB, and of the memory {free_bytes / 1e6:,.0f} MB are free"
    return None


def to_profile(compared: Sequence[Compared]) -> list[Compared]:
    """The decode sizes that are profiled: one stream at the greatest depth, and the most streams."""
    decodes = [c for c in compared if isinstance(c.size, Decode)]
    if not decodes:
        return []
    chosen = [max(decodes, key=_depth), max(decodes, key=lambda c: c.size.streams)]
    return chosen if chosen[0] is not chosen[1] else chosen[:1]


def _depth(compared: Compared) -> int:
    return compared.size.depth if isinstance(compared.size, Decode) else 0


def _profiled(ours: EngineProcess, compared: Compared) -> ProfiledStep:
    size = compared.size
    assert isinstance(size, Decode)
    found = ours.profile(size.streams, size.depth, min(PROFILED_STEPS, size.tokens))
    return ProfiledStep(size, found, compared.by_engine[REFENGINE].milliseconds.median / 1e3)
