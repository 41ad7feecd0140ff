"""Runs all checks that need a GPU, in less than ten minutes, and writes one JSON file.

    python -m tools.gpu_check --output gpu.json [--commit ID] [--sanitizer]

Runs `pytest -m gpu` (every kernel against its array code, whole models, the determinism matrix, array code); measures
the distance of the kernels' logits from `exact`; runs the kernel benchmark against a copy and cuBLAS; and with
full-size models with random weights checks that all device memory is accounted for, and measures tokens per second and
the kernels of a step (refengine bench speed), compared with the last record in golden/perf, the gain of each engine
feature (tools/bench_engine), and a worker's speeds against their targets (refengine bench worker).
The file is written after every part. The exit code is 1 if a test failed, or if a size became slower.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PERF = ROOT / "golden" / "perf"
SANITIZED = (
    "embedding",
    "matmul",
    "norm",
    "rope",
    "activation",
    "quantize_rows",
    "few_rows",
    "one_row",
    "matmul_f32",
    "moe",
    "router",
    "attention",
    "attention_step",
    "sampling",
    "memory",
    "fused",
    "decode",
)  # tests/kernels/test_*.py


def card() -> dict[str, str]:
    query = "name,driver_version,memory.total,clocks.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return dict(zip(query.split(","), [v.strip() for v in done.stdout.splitlines()[0].split(",")], strict=True))


def run_tests(*what: str, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """The outcome of `pytest -m gpu` by file, and the NMSE that tests have recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-p", "no:cacheprovider", "-q", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [*prefix, sys.executable, "-m", "pytest", "-m", "gpu", *options, *(what or ["tests"])]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-3000:], done.stderr[-1500:], file=sys.stderr)
        suite = ElementTree.parse(report).getroot()[0]
        errors: dict[str, float] = {}
        by_file: dict[str, list[int]] = {}
        for case in suite.iter("testcase"):
            skipped = case.find("skipped") is not None
            failed = case.find("failure") is not None or case.find("error") is not None
            counts = by_file.setdefault(case.attrib["classname"].rpartition(".")[2], [0, 0, 0])
            counts[2 if skipped else 1 if failed else 0] += 1
            for recorded in case.iter("property"):
                if match := re.search(r"\[(.+)\]", case.attrib["name"]):
                    errors[match[1]] = float(recorded.attrib["value"])
        return {
            "exit_code": done.returncode,
            "seconds": round(time.perf_counter() - start, 1),
            "passed_failed_skipped": by_file,
            "nmse_cupy_against_numpy": errors,
            **({"sanitizer": done.stdout[-400:]} if prefix else {}),
        }


def parity(n_prompts: int = 2) -> dict[str, Any]:
    """The NMSE and KL divergence (nats) of the kernels' logits from `exact`."""
    from tools.report_parity import MODELS, kernel_errors

    with tempfile.TemporaryDirectory() as folder:
        return {name: kernel_errors(name, "cuda", Path(folder), n_prompts)["kernels"] for name in MODELS}


def resident_bytes() -> int:
    """The peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def time_model(path: Path, numerics: str, rounds: int = 5, n_prompt: int = 256, n_decode: int = 16) -> dict[str, Any]:
    """Load, prefill and decode of a model, with kernels launched one by one; device memory, accounted and used."""
    import cupy

    import refengine
    from refengine.cache.paged import CacheSequence

    def used() -> int:
        free, total = cupy.cuda.runtime.memGetInfo()
        return int(total - free)

    cupy.get_default_memory_pool().free_all_blocks()
    cupy.zeros(1)
    before, resident = used(), resident_bytes()
    start = time.perf_counter()
    model = refengine.load(path, "cuda", numerics)
    cupy.cuda.Device().synchronize()
    load_s = time.perf_counter() - start
    loaded, grown = used() - before, resident_bytes() - resident
    prefill, decode = [], []
    for _ in range(rounds + 1):
        cache, sequence = model.new_cache(n_prompt + n_decode), CacheSequence()
        start = time.perf_counter()
        model.step([(sequence, list(range(3, 3 + n_prompt)))], cache, [n_prompt - 1])
        cupy.cuda.Device().synchronize()
        prefill.append(time.perf_counter() - start)
        start = time.perf_counter()
        for token in range(n_decode):
            model.step([(sequence, [token])], cache, [0])
        cupy.cuda.Device().synchronize()
        decode.append(time.perf_counter() - start)
    rates = {"prefill": [n_prompt / s for s in prefill[1:]], "decode": [n_decode / s for s in decode[1:]]}
    found: dict[str, Any] = {
        "numerics": numerics,
        "load_s": load_s,
        "first_prefill_s": prefill[0],
        **{f"{k}_tokens_per_s": [min(v), statistics.median(v), max(v)] for k, v in rates.items()},
        "file_tensor_bytes": model.weights.n_bytes,
        "host_bytes_grown_by_loading": grown,
        "device_bytes_after_load": loaded,
        "device_bytes_with_cache": used() - before,
    }
    if numerics == "fast":
        model.ops.memory.check_residency()
        found["accounted"] = model.ops.memory.accounted()
    return found


def full_size(name: str) -> dict[str, Any]:
    from tools import bench_engine
    from tools.make_model import FULL, write_spec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_spec(path, FULL[name])
        found: dict[str, Any] = {"model": name, "fast": time_model(path, "fast")}
        if path.stat().st_size < 1 << 30:  # array code keeps float32 weights
            found["exact"] = time_model(path, "exact")
        found["engine"] = bench_engine.bench(path, "cuda", bench_engine.parsed([]))
        return found


def speed(name: str) -> dict[str, Any]:
    """The results of `refengine bench speed` with a full-size model, compared with the last record of that model."""
    from tools.make_model import FULL, write_spec

    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / f"{name}.gguf", Path(folder) / "speed.json"
        write_spec(path, FULL[name])
        last = last_record(PERF, path.name)
        options = ["--device", "cuda", "--profile", *([] if last is None else ["--baseline", str(last)])]
        command = [sys.executable, "-m", "refengine", "bench", "speed", "--model", str(path), *options]
        done = subprocess.run([*command, "--json", str(result)], cwd=ROOT, stdout=sys.stderr)
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        found["command"] = f"refengine bench speed --model {path.name} {' '.join(options)}"
        return {"model": name, "exit_code": done.returncode, "baseline": last and last.name, **found}


def last_record(folder: Path, model: str) -> Path | None:
    """The latest result of `bench speed` in a folder that has this model on a GPU. Names begin with the date."""
    for path in sorted(folder.glob("*-speed.json"), reverse=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["device"].startswith("cuda") and any(found["model"] == model for found in record["models"]):
            return path
    return None


def worker(name: str) -> dict[str, Any]:
    """The results of `refengine bench worker` with a full-size model."""
    from tools.make_model import FULL, write_spec

    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / f"{name}.gguf", Path(folder) / "worker.json"
        write_spec(path, FULL[name])
        command = [sys.executable, "-m", "refengine", "bench", "worker", "--model", str(path), "--gpu-device", "0"]
        done = subprocess.run([*command, "--output", str(result)], cwd=ROOT, stdout=sys.stderr)
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        found["command"] = f"refengine bench worker --model {path.name} --gpu-device 0"
        return {"model": name, "exit_code": done.returncode, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", default="", help="commit under test, if git cannot tell")
    parser.add_argument("--model", action="append", help="full-size model to time (default qwen2.5-0.5b)")
    parser.add_argument("--sanitizer", action="store_true", help="also run some kernel tests under compute-sanitizer")
    parser.add_argument(
        "--only",
        action="append",
        help="run only this part: tests, parity, kernels, full_size, speed, worker or sanitizer; repeatable",
    )
    args = parser.parse_args()
    commit = (
        args.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    )
    import cupy
    import numpy

    from tools.bench_kernels import ROWS, run_all

    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": " ".join(["python -m tools.gpu_check", *(["--model " + m for m in args.model or []])]),
        "card": card(),
        "python": sys.version.split()[0],
        "versions": {"cupy": cupy.__version__, "numpy": numpy.__version__},
    }
    parts: dict[str, Any] = {
        "tests": run_tests,
        "parity": parity,
        "kernels": lambda: run_all(cupy, ROWS),
        "full_size": lambda: [full_size(name) for name in args.model or ["qwen2.5-0.5b"]],
        "speed": lambda: [speed(name) for name in args.model or ["qwen2.5-0.5b"]],
        "worker": lambda: [worker(name) for name in args.model or ["qwen2.5-0.5b"]],
    }
    if args.sanitizer:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        files = [f"tests/kernels/test_{name}.py" for name in SANITIZED]
        prefix = (tool, "--target-processes", "all", "--error-exitcode", "9")
        parts["sanitizer"] = lambda: run_tests(*files, prefix=prefix)
    for name in set(parts) - set(args.only or parts):
        del parts[name]
    for name, part in parts.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        facts[name] = part()
        args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in facts.items() if k in ("tests", "sanitizer", "full_size")}, indent=1))
    checked = [facts.get("tests", {}), facts.get("sanitizer", {}), *facts.get("speed", [])]
    return max(int(part.get("exit_code", 0)) for part in checked)


if __name__ == "__main__":
    sys.exit(main())
