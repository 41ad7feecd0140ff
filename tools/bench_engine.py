"""Measures the gain of each engine feature: tokens per second and first-token latency with one feature off at a time.

    python -m tools.bench_engine --model M.gguf --device cuda [--output FILE.json]

Measures a single stream (a prompt, then its tokens one by one), and a batch of `--requests` requests at once, whose
prompts begin with the same `--system` tokens. Both are timed with all features, and with one feature off at a time.
Greedy sampling without stop strings; each measurement follows a warm-up; results are medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import refengine
from refengine.engine.engine import Engine, EngineOptions
from refengine.engine.sampling import SamplingParams

# What is switched off: options of `load`, and of the engine.
# Array code has no graphs, launches nothing ahead, and writes the score matrix as it is.
OF_KERNELS = ("no graphs", "no step ahead", "reference attention")
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all on": ({}, {}),
    "no graphs": ({}, {"graphs": False}),
    "no step ahead": ({}, {"ahead": False}),
    "no prefix cache": ({}, {"prefix_cache": False}),
    "no batching": ({}, {"batching": False}),
    "reference attention": ({"attention": "reference"}, {}),
}


def alone(engine: Engine, ids: list[int], n_tokens: int) -> dict[str, float]:
    """The seconds to the first token, and the tokens per second after it, for one request."""
    generation = engine.start(ids, SamplingParams(temperature=0, max_tokens=n_tokens))
    times = []
    for _ in range(n_tokens):
        if generation.end is not None:
            break
        engine.next_token(generation)
        times.append(time.perf_counter() - generation.started)
    engine.free(generation)
    gaps = np.diff(times)
    return {
        "first_token_ms": 1e3 * times[0],
        "tokens_per_s": float(len(gaps) / gaps.sum()),
        "inter_token_ms_p95": 1e3 * float(np.percentile(gaps, 95)),
    }


def together(engine: Engine, prompts: list[list[int]], n_tokens: int) -> dict[str, float]:
    """For requests that arrive together: total tokens per second, first-token latencies, computed prompt tokens."""
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=n_tokens)
    requests = [engine.start(prompt, params) for prompt in prompts]
    while not engine.idle:
        engine.step()
    seconds = time.perf_counter() - start
    first = sorted(1e3 * g.first_token_s for g in requests if g.first_token_s is not None)
    return {
        "tokens_per_s": sum(g.n_generated for g in requests) / seconds,
        "first_token_ms_p50": statistics.median(first),
        "first_token_ms_p95": first[min(len(first) - 1, int(0.95 * len(first)))],
        "prompt_tokens_reused": float(sum(g.progress.prefix_tokens for g in requests)),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median, lowest, highest of each figure."""
    return {
        name: [round(f(r[name] for r in rounds), 3) for f in (lambda v: statistics.median(list(v)), min, max)]
        for name in rounds[0]
    }


def bench(path: Path | None, device: str, a: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    model, loaded = None, None
    for name, (load_options, engine_options) in SWITCHES.items():
        if name in OF_KERNELS and device == "cpu":
            continue
        if model is None or loaded != load_options:
            model = None  # its device memory is wanted
            model, loaded = refengine.load(path, device, n_ctx=a.ctx, **load_options), load_options
        n_vocab = model.config.n_vocab
        options = {"max_batch": a.requests, "max_step_tokens": a.step_tokens, "cache_tokens": a.cache, **engine_options}
        engine = Engine(model, EngineOptions(**options))
        start = time.perf_counter()
        engine.warm_up()
        warm_up_s = time.perf_counter() - start
        singles, batches = [], []
        system = rng.integers(0, n_vocab, a.system).tolist()
        for _ in range(a.rounds + 1):
            singles.append(alone(engine, rng.integers(0, n_vocab, a.prompt).tolist(), a.tokens))
            prompts = [system + rng.integers(0, n_vocab, a.prompt // 4).tolist() for _ in range(a.requests)]
            batches.append(together(engine, prompts, a.tokens))
        found[name] = {"warm_up_s": round(warm_up_s, 3), "one": medians(singles[1:]), "batch": medians(batches[1:])}
        one, batch = found[name]["one"], found[name]["batch"]
        print(
            f"{name:20} one: {one['tokens_per_s'][0]:8.1f} tokens/s, first {one['first_token_ms'][0]:7.1f} ms | "
            f"{a.requests} at once: {batch['tokens_per_s'][0]:8.1f} tokens/s, first p50 "
            f"{batch['first_token_ms_p50'][0]:7.1f} p95 {batch['first_token_ms_p95'][0]:7.1f} ms",
            flush=True,
        )
        del engine
    return found


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="GGUF file (default: the packaged model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or host")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    parser.add_argument("--system", type=int, default=512, metavar="N", help="tokens that the prompts of a batch share")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to generate (default 64)")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="requests at once (default 8)")
    parser.add_argument("--step-tokens", type=int, default=512, metavar="N", help="tokens of a step (default 512)")
    parser.add_argument("--cache", type=int, default=16384, metavar="N", help="positions of the KV cache")
    parser.add_argument("--ctx", type=int, default=2048, metavar="N", help="context length in tokens (default 2048)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write all results as JSON to this file")
    return parser.parse_args(arguments)


def main() -> int:
    a = parsed()
    results = bench(a.model, a.device, a)
    if a.output:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.machine(),
            "command": " ".join(["python -m tools.bench_engine", *sys.argv[1:]]),
            "results": results,
        }
        a.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
