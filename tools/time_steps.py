"""Times a decode step on a GPU as the engine runs it: as replays of its CUDA graph, and kernel by kernel in place.

    python -m tools.time_steps --model M.gguf --rows 1,8 --depths 140,3500 --kernels

A replay's time is measured by CUDA events, ten replays at a time. With --kernels, CUPTI (through PyTorch's profiler,
which must be installed) sees the kernels of the graph as they overlap: a kernel's time in place is from the end of the
kernel before it to its own end, so that the times of all kernels add up to the step. Kernels are grouped by name, grid,
block and the kernel before them. `refengine bench speed --profile` needs no PyTorch, but times each kernel alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refengine.api import load
from refengine.engine.engine import Engine, EngineOptions
from refengine.engine.sampling import SamplingParams

REPLAYS, SAMPLES, BEFORE = 10, 9, 10  # replays of a sample; samples; tokens of each sequence before them


@dataclass(frozen=True)
class InPlace:
    """Equal kernels of a step. name: also the grid, the block, and the kernel before. calls: in a step. total, median:
    µs in place, of all and of one. alone: the median of their own durations, which begin before the kernel in front of
    them has ended.
    """

    name: str
    calls: float
    total: float
    median: float
    alone: float


def in_place(events: Iterable[dict[str, Any]], steps: int) -> list[InPlace]:
    """The kernels among a Chrome trace's events (`ts` and `dur` in µs) of `steps` steps; the longest first."""
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: float(e["ts"]))
    groups: dict[str, list[tuple[float, float]]] = {}
    end, before = None, "the start"
    for event in kernels:
        stop = event["ts"] + event["dur"]
        grid, block = ("x".join(map(str, event.get("args", {}).get(key, ()))) for key in ("grid", "block"))
        name = f"{event['name']} {grid} of {block} after {before}"
        groups.setdefault(name, []).append((event["dur"] if end is None else max(stop - end, 0.0), event["dur"]))
        end, before = max(stop, end or 0.0), event["name"]
    found = []
    for name, times in groups.items():
        spent, alone = zip(*times, strict=True)
        found.append(
            InPlace(name, len(times) / steps, sum(spent) / steps, float(np.median(spent)), float(np.median(alone)))
        )
    return sorted(found, key=lambda group: -group.total)


def traced(replay: Callable[[], None], steps: int) -> list[InPlace]:
    """The kernels of `steps` replays, by CUPTI."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # before the profiler begins
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return in_place(json.loads(path.read_text())["traceEvents"], steps)


def replay_times(replay: Callable[[], None]) -> list[float]:
    """µs of one replay, in each of SAMPLES samples of REPLAYS; ascending."""
    import cupy

    times = []
    for _ in range(SAMPLES):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record()
        for _ in range(REPLAYS):
            replay()
        last.record()
        last.synchronize()
        times.append(cupy.cuda.get_elapsed_time(first, last) / REPLAYS * 1e3)
    return sorted(times)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="F.gguf")
    parser.add_argument("--rows", type=numbers, default=[1, 8], help="numbers of sequences (default 1,8)")
    parser.add_argument("--depths", type=numbers, default=[140, 3500], help="positions before (default 140,3500)")
    parser.add_argument("--kernels", action="store_true", help="also the kernels in place, with CUPTI through PyTorch")
    given = parser.parse_args(arguments)
    model = load(given.model, "cuda")
    model.vocabulary = None  # so that no token ends a sequence
    draw = np.random.default_rng(0)
    for n in given.rows:
        for depth in given.depths:
            room = BEFORE + REPLAYS * (SAMPLES + 1) + 2
            engine = Engine(model, EngineOptions(n, cache_tokens=n * (depth + room + 64)))
            engine.warm_up()
            params = SamplingParams(temperature=0, max_tokens=room)
            prompts = [draw.integers(0, model.config.n_vocab, depth).tolist() for _ in range(n)]
            running = [engine.start(ids, params) for ids in prompts]
            while any(generation.n_generated < BEFORE for generation in running):
                engine.step()
            runner: Any = engine.runner
            replay = runner.replay_step(n)
            times = replay_times(replay)
            median, spread = times[SAMPLES // 2], f"{times[0]:.1f} to {times[-1]:.1f}"
            print(f"rows {n}, depth {depth}: {median:.1f} µs ({spread}), {n * 1e6 / median:.0f} tokens/s")
            for group in traced(replay, REPLAYS) if given.kernels else ():
                of_one = f"{group.calls:5.1f} x {group.median:6.2f} (alone {group.alone:6.2f})"
                print(f"  {group.total:8.1f} µs  {of_one}  {group.name}")
            for generation in running:
                engine.free(generation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
