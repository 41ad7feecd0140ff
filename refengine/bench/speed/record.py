"""The JSON data of a run, with every sample. The reports and the comparison with an earlier run are made from it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import refengine
from refengine.bench.report import commit, machine
from refengine.bench.speed.measure import Decode, Measurement, Size, Spread
from refengine.bench.speed.run import Compared, ModelResult, ProfiledStep, Settings
from refengine.errors import RequestError

SCHEMA = "refengine-speed"
VERSION = 1

Record = dict[str, Any]


def record(results: Sequence[ModelResult], settings: Settings, command: str) -> Record:
    """The data of a run. command: the command line."""
    device = str(results[0].engines["refengine"]["device"])
    return {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine(device),
        "device": device,
        "commit": commit(),
        "version": refengine.__version__,
        "command": command,
        "settings": asdict(settings),
        "models": [_of_model(result) for result in results],
    }


def read_record(path: Path) -> Record:
    """An earlier run. Raises RequestError if the file is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not JSON"
        raise RequestError(f"--baseline {path} cannot be read: {reason}") from None
    given = found.get("schema") if isinstance(found, dict) else None
    if given != SCHEMA or found.get("schema_version") != VERSION:
        raise RequestError(
            f"--baseline {path} is not a result of `refengine bench speed --json` of this version "
            f"(schema {given!r}; expected {SCHEMA!r}, version {VERSION})"
        )
    return dict(found)


def key(size: Record) -> tuple[Any, ...]:
    """What identifies a size of a record, apart from the number of steps."""
    return size["kind"], size.get("n"), size.get("streams"), size.get("depth")


def _of_model(result: ModelResult) -> Record:
    copied = Spread.of(result.copy_rates)
    return {
        "model": result.path.name,
        "engines": result.engines,
        "copy_bytes_per_s": {**asdict(copied), "samples": result.copy_rates},
        "measurements": [_of_size(compared, copied.median) for compared in result.compared],
        "left_out": [{**_size(left.size), "reason": left.reason} for left in result.left_out],
        "profiles": [_of_profile(profiled, copied.median) for profiled in result.profiles],
    }


def _size(size: Size) -> Record:
    kind = "decode" if isinstance(size, Decode) else "prompt"
    return {"kind": kind, "label": size.label, **asdict(size)}


def _of_size(compared: Compared, copied: float) -> Record:
    found = _size(compared.size)
    found["engines"] = {
        name: _of_engine(measured, compared.bytes_of_step.get(name), copied)
        for name, measured in compared.by_engine.items()
    }
    if compared.ratios:
        found["ratio"] = {**asdict(Spread.of(compared.ratios)), "pairs": compared.ratios}
    return found


def _of_engine(measured: Measurement, n_bytes: int | None, copied: float) -> Record:
    found: Record = {
        "tokens_per_s": asdict(measured.rate),
        "milliseconds": asdict(measured.milliseconds),
        "samples": [asdict(sample) for sample in measured.samples],
    }
    if n_bytes is not None:
        rate = n_bytes / (measured.milliseconds.median / 1e3)
        found |= {"bytes_per_step": n_bytes, "bytes_per_s": rate, "share_of_copy": rate / copied}
    return found


def _of_profile(profiled: ProfiledStep, copied: float) -> Record:
    profile = profiled.profile
    rows = []
    for row in profile.rows:
        rate = None if row.n_bytes is None or not row.seconds else row.n_bytes / row.seconds
        rows.append(
            {
                **asdict(row),
                "share_of_step": row.seconds / profile.seconds,
                "bytes_per_s": rate,
                "share_of_copy": None if rate is None else rate / copied,
            }
        )
    timed = sum(row.seconds for row in profile.rows)
    rest_s = max(0.0, profile.seconds - timed)
    return {
        **_size(profiled.size),
        "by": profile.by,
        "step_s": profile.seconds,
        "unprofiled_step_s": profiled.unprofiled_s,
        "rows": rows,
        "rest": {"name": profile.rest, "seconds": rest_s, "share_of_step": rest_s / profile.seconds},
    }
