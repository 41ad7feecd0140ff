"""Reports the registers, shared memory, stack, spills and instructions of every kernel, by architecture. Needs no GPU.

    python -m tools.report_kernels                       compares with golden/kernels.json
    python -m tools.report_kernels --write               records all of them there
    python -m tools.report_kernels --write norm matmul   records these two files, and leaves the others as they are

All files take some minutes, a small one some seconds. Needs '.[nvrtc]' (or cuda12, cuda13).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refengine.cuda.runtime.nvrtc import ARCHITECTURES, compile_source, nvrtc_version
from refengine.cuda.runtime.source import names, read_source

RECORD = Path(__file__).resolve().parents[1] / "golden" / "kernels.json"
FIELDS = ("registers", "shared", "stack", "spilled", "instructions")


def measured(files: Sequence[str]) -> dict[str, Any]:
    """Kernel → architecture → figures, in the order of FIELDS."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for name in tqdm(files, desc="compile", unit="file", leave=False):
        for arch in ARCHITECTURES:
            for kernel, resources in compile_source(read_source(name), arch).resources.items():
                kernels.setdefault(kernel, {})[arch] = [asdict(resources)[field] for field in FIELDS]
    return kernels


def written(record: dict[str, Any]) -> str:
    """JSON with one line per kernel."""
    lines = ",\n".join(f'  "{kernel}": {json.dumps(figures)}' for kernel, figures in record["kernels"].items())
    head = f'{{"nvrtc": {json.dumps(record["nvrtc"])}, "fields": {json.dumps(record["fields"])}, "kernels": {{\n'
    return f"{head}{lines}\n}}}}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="kernel files, by name without .cu (default: all)")
    parser.add_argument("--write", action="store_true", help="write the results to golden/kernels.json")
    args = parser.parse_args()
    unknown = sorted(set(args.files) - set(names()))
    if unknown:
        parser.error(f"no kernel file {', '.join(unknown)}; there are {', '.join(names())}")
    files = args.files or names()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if len(files) < len(names()) and record["nvrtc"] != nvrtc_version():
        parser.error(f"{RECORD.name} is of NVRTC {record['nvrtc']}, here is {nvrtc_version()}: measure all files")
    in_files = {kernel for name in files for kernel in read_source(name).kernels}
    gone = set() if len(files) < len(names()) else set(record["kernels"]) - in_files
    found, recorded = measured(files), {k: v for k, v in record["kernels"].items() if k in in_files | gone}
    changed = [kernel for kernel in sorted(found.keys() | recorded.keys()) if found.get(kernel) != recorded.get(kernel)]
    for kernel in changed:
        print(f"{kernel}: recorded {recorded.get(kernel)}, now {found.get(kernel)}")
    print(f"{len(found)} kernels, {len(changed)} changed")
    if not args.write:
        return int(bool(changed))
    kernels = {k: v for k, v in record["kernels"].items() if k not in in_files | gone} | found
    record = {"nvrtc": nvrtc_version(), "fields": FIELDS, "kernels": dict(sorted(kernels.items()))}
    RECORD.write_text(written(record), encoding="utf-8")
    print(f"{RECORD}: {len(kernels)} kernels for {', '.join(ARCHITECTURES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
