"""Measures products with quantised weights on a GPU, and how much of the memory bandwidth they reach.

    python -m tools.bench_kernels [--output FILE.json]

For matrices of the target models, with 1, 8, 64 and 512 rows: the time of one product (median of several rounds, each
over so many copies of the weights that none is in the cache), the GB/s at which weights are read, the ratio of that to
a measured copy, and the time of cuBLAS with float16 weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.cuda.kernels import matmul
from refengine.cuda.kernels.few_rows import FEW_ROWS, plan_of, reads_halves
from refengine.cuda.kernels.quantize_rows import Converted, Rows, quantize_rows
from refengine.cuda.layout import PackedMatrix, pack
from refengine.cuda.runtime.launch import Kernels
from refengine.device import open_device
from refengine.weights import Matrix

SHAPES = (
    ("phi3 qkv", "Q4_K", 9216, 3072),
    ("phi3 gate+up", "Q4_K", 16384, 3072),
    ("phi3 down", "Q4_K", 3072, 8192),
    ("phi3 down", "Q6_K", 3072, 8192),
    ("phi3 head", "Q6_K", 32064, 3072),
    ("phi3 gate+up", "Q5_K", 16384, 3072),
    ("qwen2 up", "Q5_0", 4864, 896),
    ("qwen2 down", "Q6_K", 896, 4864),
    ("qwen2 head", "Q8_0", 151936, 896),
    ("gpt-oss q", "Q8_0", 4096, 2880),
    ("gpt-oss head", "Q8_0", 201088, 2880),
    ("gpt-oss experts", "MXFP4", 23040, 2880),
    ("large", "Q4_0", 16384, 4096),
    ("large", "Q5_0", 16384, 4096),
    ("large", "F16", 16384, 4096),
)
ROWS = (1, 8, 64, 512)
COLD_BYTES = 256 << 20  # of weights between two uses of the same copy: several times the cache
ROUNDS = 5


def repeated_matrix(xp: Any, kind: str, n_out: int, n_in: int) -> PackedMatrix:
    """A matrix in which every 64 rows are repeated, because only its size matters here."""
    fmt = quants.SUPPORTED[GGMLQuantizationType[kind]]
    n_bytes = 64 * n_in // fmt.block_size * fmt.block_bytes
    raw = np.random.default_rng(0).integers(0, 60, n_bytes, dtype=np.uint8)
    small = pack(np, Matrix("bench", fmt.type, (64, n_in), raw))
    return PackedMatrix("bench", fmt.type, (n_out, n_in), xp.tile(xp.asarray(small.data), n_out // 64))


def seconds(xp: Any, run: Any, n: int, stream: Any = None, each: int = 1) -> list[float]:
    """The seconds of one call of `run(i)`, i from 0 to n - 1, by `each`, for every round after a warm-up round."""
    times = []
    for _ in range(ROUNDS + 1):
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        start.record(stream)
        for i in range(n):
            run(i)
        stop.record(stream)
        stop.synchronize()
        times.append(xp.cuda.get_elapsed_time(start, stop) / 1e3 / n / each)
    return times[1:]


def graph_seconds(xp: Any, run: Any, n: int) -> list[float]:
    """Like `seconds`, with a CUDA graph, so that only the kernels are measured and not Python."""
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        run(0)
        stream.synchronize()
        stream.begin_capture()
        for i in range(n):
            run(i)
        graph = stream.end_capture()
        return seconds(xp, lambda i: graph.launch(stream), 1, stream, n)


def cublas_seconds(xp: Any, n_out: int, n_in: int, n_rows: int) -> float:
    """The time of a float16 product of the same shape with cuBLAS; small weights are copied to avoid the cache."""
    n_copies = max(1, min(16, COLD_BYTES // (2 * n_out * n_in)))
    weights = [(xp.random.standard_normal((n_in, n_out), dtype=xp.float32)).astype(xp.float16) for _ in range(n_copies)]
    x = (xp.random.standard_normal((n_rows, n_in))).astype(xp.float16)
    y = xp.empty((n_rows, n_out), xp.float16)

    def run(i: int) -> None:
        xp.matmul(x, weights[i % n_copies], out=y)

    return float(np.median(seconds(xp, run, max(20, n_copies))))


def copy_bandwidth(xp: Any) -> float:
    """The bytes per second that a copy within device memory reads and writes."""
    source = xp.zeros(1 << 30, xp.uint8)
    target = xp.empty_like(source)
    return float(2 * source.nbytes / np.median(seconds(xp, lambda i: xp.copyto(target, source), 10)))


def bench(xp: Any, kernels: Kernels, kind: str, n_out: int, n_in: int, n_rows: int) -> dict[str, Any]:
    one = repeated_matrix(xp, kind, n_out, n_in)
    n_copies = max(1, -(-COLD_BYTES // one.n_bytes)) if n_rows <= 64 else 2
    copies = [one]
    for _ in range(n_copies - 1):
        copies.append(replace(one, data=one.data.copy()))
    converted = Converted.empty(xp, n_rows, n_in, halves=reads_halves(one))
    floats = xp.random.standard_normal((n_rows, n_in)).astype(xp.float32)
    quantize_rows(kernels, Rows(n_rows, floats), converted)
    rows, y = Rows(n_rows, None, converted), xp.empty((n_rows, n_out), xp.float32)
    warps = 4
    if n_rows <= FEW_ROWS:
        warps = plan_of(kernels, rows, [one]).warps

    def run(i: int) -> None:
        matmul.linear(kernels, rows, copies[i % n_copies], y)

    times = graph_seconds(xp, run, max(n_copies, 20))
    median = float(np.median(times))
    return {
        "warps": warps,
        "microseconds": [round(t * 1e6, 2) for t in (median, min(times), max(times))],
        "gb_per_s": round(one.n_bytes / median / 1e9, 1),
        "tflop_per_s": round(2.0 * n_out * n_in * n_rows / median / 1e12, 2),
        "weight_mb": round(one.n_bytes / 1e6, 2),
    }


def run_all(xp: Any, rows: Sequence[int]) -> dict[str, Any]:
    """The figures of all shapes; each is printed as soon as it is measured."""
    kernels = Kernels("cuda")
    copied = copy_bandwidth(xp)
    print(f"copy {copied / 1e9:.0f} GB/s (read and written)")
    results = []
    for what, kind, n_out, n_in in SHAPES:
        for n_rows in rows:
            found = bench(xp, kernels, kind, n_out, n_in, n_rows)
            found |= {"what": what, "type": kind, "n_out": n_out, "n_in": n_in, "rows": n_rows}
            found["share_of_copy"] = round(found["gb_per_s"] * 1e9 / copied, 3)
            found["cublas_f16_microseconds"] = round(cublas_seconds(xp, n_out, n_in, n_rows) * 1e6, 2)
            results.append(found)
            print(
                f"{what:16} {kind:6} {n_out:6} x {n_in:5} {n_rows:4} rows {found['warps']:2} warps "
                f"{found['microseconds'][0]:9.1f} us "
                f"{found['gb_per_s']:7.0f} GB/s {found['share_of_copy']:6.1%} {found['tflop_per_s']:7.1f} TFLOP/s, "
                f"cuBLAS f16 {found['cublas_f16_microseconds']:8.1f} us",
                flush=True,
            )
    return {"copy_gb_per_s": round(copied / 1e9, 1), "results": results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of activations")
    parser.add_argument("--commit", default="", help="commit of the sources, to be recorded")
    given = parser.parse_args()
    xp = open_device("cuda").xp
    found = run_all(xp, given.rows)
    if given.output:
        record = {
            "date": datetime.date.today().isoformat(),
            "device": xp.cuda.runtime.getDeviceProperties(0)["name"].decode(),
            "commit": given.commit,
            "command": " ".join(["python -m tools.bench_kernels", *sys.argv[1:]]),
            "cupy": xp.__version__,
            **found,
        }
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
