"""Measures load time, peak memory, prefill and decode speed of refengine and llama.cpp on the same file and machine.

    python -m tools.bench_throughput --model model.gguf --threads 2

Each engine runs in its own process, in turns, so that neither affects the other. Prefill is `--prompt-tokens` tokens at
once with an empty cache, decode is `--decode-tokens` single tokens after them; both follow a warm-up run. Reports the
median and the spread (lowest, highest) over `--rounds` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("refengine", "llama.cpp", "llama.cpp-repacked")


def measure(engine: str, model: str, numerics: str, n_prompt: int, n_decode: int, rounds: int, threads: int) -> Any:
    """Run one engine in this process; returns the seconds per run as lists."""
    start = time.perf_counter()
    if engine == "refengine":
        begin, run = _refengine(model, numerics)
    else:
        begin, run = _llamacpp(engine, model, threads, n_prompt + n_decode)
    load_s = time.perf_counter() - start
    ids = [(7 * i + 11) % 250 + 3 for i in range(n_prompt + n_decode)]
    first_s = None
    prefill, decode = [], []
    for _ in range(rounds + 1):
        begin()
        start = time.perf_counter()
        run(ids[:n_prompt])
        prefill.append(time.perf_counter() - start)
        first_s = first_s or prefill[0]
        start = time.perf_counter()
        for token in ids[n_prompt:]:
            run([token])
        decode.append(time.perf_counter() - start)
    return {
        "engine": engine,
        "load_s": load_s,
        "first_prefill_s": first_s,
        "prefill_s": prefill[1:],
        "decode_s": decode[1:],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


Engine = tuple[Callable[[], None], Callable[[list[int]], None]]


def _refengine(path: str, numerics: str) -> Engine:
    import refengine
    from refengine.cache.paged import CacheSequence, KVCache

    model = refengine.load(path, numerics=numerics)
    state: dict[str, Any] = {}

    def begin() -> None:
        state["cache"], state["sequence"] = model.new_cache(4096), CacheSequence()

    def run(ids: list[int]) -> None:
        cache: KVCache = state["cache"]
        model.step([(state["sequence"], ids)], cache, [len(ids) - 1])

    return begin, run


def _llamacpp(engine: str, path: str, threads: int, n_ctx: int) -> Engine:
    from refengine.validate.llamacpp import LlamaCpp

    peer = LlamaCpp(path, n_threads=threads, n_ctx=n_ctx, repack=engine.endswith("repacked"), capture=False)

    def run(ids: list[int]) -> None:
        peer.logits(ids, last_only=True)

    return peer.reset, run


def report(results: list[dict[str, Any]], n_prompt: int, n_decode: int) -> list[str]:
    """A table with one line per engine: medians with (lowest, highest)."""
    lines = [f"{'engine':20} {'load s':>7} {'first s':>8} {'prefill tok/s':>22} {'decode tok/s':>22} {'peak MiB':>9}"]
    for r in results:
        prefill = _rates(r["prefill_s"], n_prompt)
        decode = _rates(r["decode_s"], n_decode)
        lines.append(
            f"{r['engine']:20} {r['load_s']:7.2f} {r['first_prefill_s']:8.2f} {prefill:>22} {decode:>22} "
            f"{r['peak_rss_mib']:9.0f}"
        )
    return lines


def _rates(seconds: list[float], n: int) -> str:
    rates = sorted(n / s for s in seconds)
    return f"{statistics.median(rates):.1f} ({rates[0]:.1f}, {rates[-1]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="engine to run (default: all); repeatable")
    parser.add_argument("--numerics", default="exact", help="refengine's numerics profile (default: exact)")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", help="also write all results as JSON to this file")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        print(json.dumps(measure(a.worker, a.model, a.numerics, a.prompt_tokens, a.decode_tokens, a.rounds, a.threads)))
        return
    results = []
    for engine in a.engine or ENGINES:
        command = [sys.executable, "-m", "tools.bench_throughput", *sys.argv[1:], "--worker", engine]
        threads = {name: str(a.threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{engine} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(report(results[-1:], a.prompt_tokens, a.decode_tokens)[-1], file=sys.stderr)
    print("\n".join(report(results, a.prompt_tokens, a.decode_tokens)))
    if a.output:
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": " ".join(["python -m tools.bench_throughput", *sys.argv[1:]]),
            "numerics": a.numerics,
            "prompt_tokens": a.prompt_tokens,
            "decode_tokens": a.decode_tokens,
            "results": results,
        }
        Path(a.output).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
