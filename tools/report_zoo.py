"""Validates a zoo of broken engines; prints a table of the planted mistakes and the verdicts.

    python -m tools.report_zoo > golden/zoo.md

Each engine of `tests/validate/zoo.py` has one mistake; its verdict is based only on its tensors. The last rows are
llama.cpp on the same models. Needs '.[validate]'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from refengine.validate.judge import judge
from refengine.validate.peers import capture_peer
from refengine.validate.run import validate
from tests.validate.zoo import FAULTS, Fault, capture, load
from tools.make_model import TINY, write_spec


def model_file(name: str, folder: Path) -> Path:
    path = folder / f"{name}.gguf"
    if not path.exists():
        write_spec(path, TINY[name])
    return path


def row(fault: Fault, folder: Path) -> str:
    broken, model = fault.models(model_file(fault.model, folder))
    outcome = validate(model, capture(broken))
    first = outcome.verdict.first_own_error
    if first is None:
        return f"| {fault.name} | {fault.model} | **not found** | | | |"
    verdict = "" if first.name == fault.expected else f" **(planted in {fault.expected})**"
    cause = outcome.causes[0] if outcome.causes else "not known"
    own = f"{first.local.nmse:.0e} ({first.threshold:.0e})" if first.local.finite else "NaN"
    return f"| {fault.name} | {fault.model} | {first.name}{verdict} | {own} | {cause} | {outcome.where} |"


def main() -> None:
    lines = ["# Broken engines and their verdicts", "", "`python -m tools.report_zoo`", ""]
    lines += ["| planted | model | first own error | NMSE (allowed) | cause named | where |"]
    lines += ["|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        lines += [row(fault, Path(folder)) for fault in tqdm(FAULTS, desc="broken", leave=False)]
        lines += ["", "llama.cpp live on the same models, 40 tokens each; none is to be blamed:", ""]
        lines += ["| model | verdict | tensors | least margin |", "|---|---|---|---|"]
        for name in tqdm(sorted({fault.model for fault in FAULTS}), desc="healthy", leave=False):
            path = model_file(name, Path(folder))
            model = load(path, name)
            ids = np.random.default_rng(11).integers(0, model.config.n_vocab, 40).tolist()
            verdict = judge(model, capture_peer("llama.cpp", model, ids))
            nearest = verdict.least_margin
            assert nearest is not None
            said = "agrees" if verdict else "**diverges**"
            lines.append(f"| {name} | {said} | {len(verdict.tensors)} | {nearest.margin:.1f} ({nearest.name}) |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
