"""Everything that only a GPU can show, in one command; writes one JSON file.

    python -m tools.gpu_check --output gpu.json

Runs `pytest -m gpu`, collects its figures, and times the array code on a full-size model with random weights.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]


def card() -> dict[str, str]:
    query = "name,driver_version,memory.total,clocks.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return dict(zip(query.split(","), [v.strip() for v in done.stdout.splitlines()[0].split(",")], strict=True))


def run_tests() -> dict[str, Any]:
    """Outcome of `pytest -m gpu`, and the NMSE that each test recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *options]
        done = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        suite = ElementTree.parse(report).getroot()[0]
        errors = {
            match[1]: float(prop.attrib["value"])
            for case in suite.iter("testcase")
            for prop in case.iter("property")
            if (match := re.search(r"\[(.+)\]", case.attrib["name"]))
        }
        counts = {k: int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped")}
        return {"exit_code": done.returncode, **counts, "nmse_cupy_against_numpy": errors}


def time_model(name: str, rounds: int = 5, n_prompt: int = 256, n_decode: int = 16) -> dict[str, Any]:
    """Load, prefill and decode of a full-size model on the array code, seconds."""
    import cupy

    import refengine
    from refengine.kv_cache import Sequence
    from tools.make_model import FULL, write_spec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_spec(path, FULL[name])
        start = time.perf_counter()
        model = refengine.load(path, "cuda", "exact")
        cupy.cuda.Device().synchronize()
        load_s = time.perf_counter() - start
        prefill, decode = [], []
        for _ in range(rounds + 1):
            cache, sequence = model.new_cache(n_prompt + n_decode), Sequence()
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
        return {
            "model": name,
            "load_s": load_s,
            "first_prefill_s": prefill[0],
            **{f"{k}_tokens_per_s": [min(v), statistics.median(v), max(v)] for k, v in rates.items()},
            "device_memory_used_mib": (lambda free, total: (total - free) >> 20)(*cupy.cuda.runtime.memGetInfo()),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", default="", help="commit under test, where git cannot tell")
    parser.add_argument("--model", action="append", help="full-size model to time (default qwen2.5-0.5b)")
    args = parser.parse_args()
    commit = (
        args.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    )
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": " ".join(["python -m tools.gpu_check", *(["--model " + m for m in args.model or []])]),
        "card": card(),
        "python": sys.version.split()[0],
    }
    import cupy
    import numpy

    facts["versions"] = {"cupy": cupy.__version__, "numpy": numpy.__version__}
    facts["tests"] = run_tests()
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")  # kept if the timing is cut off
    facts["array_code"] = [time_model(name) for name in args.model or ["qwen2.5-0.5b"]]
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in facts.items() if k != "tests"}, indent=1))
    print({k: v for k, v in facts["tests"].items() if not isinstance(v, dict)})
    return int(facts["tests"]["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
