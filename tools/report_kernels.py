"""Reports the registers, shared memory, stack and spills of every kernel, by architecture. Needs no GPU.

    python -m tools.report_kernels          compares with golden/kernels.json
    python -m tools.report_kernels --write  records it there

Needs '.[nvrtc]' (or cuda12, cuda13).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refengine.cuda.runtime.nvrtc import ARCHITECTURES, compile_source, nvrtc_version
from refengine.cuda.runtime.source import names, read_source

RECORD = Path(__file__).resolve().parents[1] / "golden" / "kernels.json"
FIELDS = ("registers", "shared", "stack", "spilled")


def measured() -> dict[str, Any]:
    """Kernel → architecture → figures, in the order of FIELDS."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for name in names():
        for arch in ARCHITECTURES:
            for kernel, resources in compile_source(read_source(name), arch).resources.items():
                kernels.setdefault(kernel, {})[arch] = [asdict(resources)[field] for field in FIELDS]
    return {"nvrtc": nvrtc_version(), "fields": FIELDS, "kernels": dict(sorted(kernels.items()))}


def written(record: dict[str, Any]) -> str:
    """JSON with one line per kernel."""
    lines = ",\n".join(f'  "{kernel}": {json.dumps(figures)}' for kernel, figures in record["kernels"].items())
    head = f'{{"nvrtc": {json.dumps(record["nvrtc"])}, "fields": {json.dumps(record["fields"])}, "kernels": {{\n'
    return f"{head}{lines}\n}}}}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results to golden/kernels.json")
    found = measured()
    if parser.parse_args().write:
        RECORD.write_text(written(found), encoding="utf-8")
        print(f"{RECORD}: {len(found['kernels'])} kernels for {', '.join(ARCHITECTURES)}")
        return 0
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
    changed = 0
    for kernel in sorted(found["kernels"].keys() | recorded.keys()):
        before, now = recorded.get(kernel), found["kernels"].get(kernel)
        if before != now:
            changed += 1
            print(f"{kernel}: recorded {before}, now {now}")
    print(f"{len(found['kernels'])} kernels, {changed} changed")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
