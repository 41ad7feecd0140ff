"""Compares the speed of two source trees of this project on the same model and device, in turns.

    python -m tools.bench_commits --trees BEFORE AFTER --model M.gguf --device cuda [--rounds 3] [--output FILE.json]

Each round starts a process per tree, in alternating order, so that a drift of clocks or of the machine affects both. A
process loads the model and measures one stream (time to the first token for `--prompt` tokens, then tokens per second)
and `--requests` streams at once, with greedy sampling and random ids, after one repetition that is not measured. Prints
medians with the lowest and highest value, and the ratio of the second tree's median to the first's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEASURE = """
import json, sys, time
import numpy as np
import refengine
from refengine.engine.engine import Engine, EngineOptions
from refengine.engine.sampling import SamplingParams

path, device, prompt, tokens, requests, repeats = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
print(refengine.__file__, file=sys.stderr)
start = time.perf_counter()
model = refengine.load(path, device, n_ctx=2048)
found = {"load_s": [time.perf_counter() - start]}
engine = Engine(model, EngineOptions(max_batch=requests, cache_tokens=2048 * requests, prefix_cache=False))
engine.warm_up()
rng = np.random.default_rng(0)
ids = lambda: rng.integers(0, model.config.n_vocab, prompt).tolist()
note = lambda name, value, i: found.setdefault(name, []).append(value) if i else None
for i in range(repeats + 1):
    generation = engine.start(ids(), SamplingParams(temperature=0, max_tokens=tokens))
    start = time.perf_counter()
    engine.next_token(generation)
    first = time.perf_counter()
    n = 0
    while generation.end is None:
        engine.next_token(generation)
        n += 1
    end = time.perf_counter()
    engine.free(generation)
    note("first_token_ms", 1e3 * (first - start), i)
    note("tokens_per_s", n / (end - first), i)
    running = [engine.start(ids(), SamplingParams(temperature=0, max_tokens=tokens)) for _ in range(requests)]
    while any(g.n_generated == 0 for g in running):
        engine.step()
    before, start = sum(g.n_generated for g in running), time.perf_counter()
    while not engine.idle:
        engine.step()
    seconds = time.perf_counter() - start
    note("batch_tokens_per_s", (sum(g.n_generated for g in running) - before) / seconds, i)
    for generation in running:
        engine.free(generation)
print(json.dumps(found))
"""


def measure(tree: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The figures of one process that runs the package of `tree`. Raises CalledProcessError if it fails."""
    numbers = (arguments.prompt, arguments.tokens, arguments.requests, arguments.repeats)
    command = [sys.executable, "-c", MEASURE, str(arguments.model.resolve()), arguments.device, *map(str, numbers)]
    # `python -c` looks into the current folder first: that is where the tree's own package is.
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each figure: its summary for the first and the second tree, and the ratio of their medians."""
    values: list[dict[str, list[float]]] = [{}, {}]
    for turn in range(arguments.rounds):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            for name, measured in measure(arguments.trees[i], arguments).items():
                values[i].setdefault(name, []).extend(measured)
    results: dict[str, Any] = {}
    for name in values[0]:
        before, after = summary(values[0][name]), summary(values[1][name])
        results[name] = {"before": before, "after": after, "ratio": after["median"] / before["median"]}
        shown = " ".join(f"{s['median']:9.2f} ({s['lowest']:.2f}, {s['highest']:.2f})" for s in (before, after))
        print(f"{arguments.model.stem:20} {name:20} {shown}  x{results[name]['ratio']:.3f}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs=2, type=Path, required=True, metavar=("BEFORE", "AFTER"), help="source trees")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--device", default="cuda", help="cpu, cuda, cuda:N or host (default: cuda)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="prompt tokens (default: 512)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="streams at once (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes per tree (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements per process (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write all figures to this file")
    arguments = parser.parse_args()
    results = bench(arguments)
    if arguments.output:
        record = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "results": results}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
