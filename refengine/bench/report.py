"""Shows figures as a table and histograms, and as JSON with the machine and the command."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import refengine
from refengine.bench.figures import Figure

COLUMNS = ("p50", "p95", "p99", "max")
DRAWN_FROM = 10  # the least number of samples for which a histogram is drawn


def show(figures: Sequence[Figure], console: Console, title: str) -> None:
    """Print the figures: first the histograms, so that the table stays on the screen."""
    for figure in figures:
        bars = figure.bars()
        if bars and len(figure.samples) >= DRAWN_FROM:
            console.print(f"{figure.id} {figure.name}, {figure.unit}, {len(figure.samples)} samples", markup=False)
            for line in bars:
                console.print(line, markup=False)
            console.print()
    table = Table(title=title, title_justify="left")
    table.add_column("id")
    table.add_column("what")
    for name in ("samples", *COLUMNS):
        table.add_column(name, justify="right")
    for name in ("unit", "target", ""):
        table.add_column(name)
    for figure in figures:
        single = len(figure.samples) == 1
        values = [_number(figure.at(c)) if not single or c == figure.judged else "" for c in COLUMNS]
        style = {"miss": "bold red", "pass": "green"}.get(figure.verdict, "")
        table.add_row(
            *(figure.id, figure.name, str(len(figure.samples)), *values, figure.unit, figure.target_text),
            figure.verdict,
            style=style,
        )
    console.print(table)
    for figure in figures:
        if figure.note:
            console.print(f"{figure.id} {figure.name}: {figure.note}", markup=False)


def record(figures: Sequence[Figure], facts: dict[str, Any], command: str) -> dict[str, Any]:
    """All figures, the machine and the command, as JSON data."""
    misses = [f"{figure.id} {figure.name}" for figure in figures if figure.verdict == "miss"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        **machine(str(facts.get("health", {}).get("device", ""))),
        "commit": commit(),
        "version": refengine.__version__,
        "command": command,
        "misses": misses,
        "figures": [figure.json() for figure in figures],
        **facts,
    }


def machine(device: str) -> dict[str, Any]:
    """The processor, and for a CUDA device the card and its driver."""
    result: dict[str, Any] = {"machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}"}
    if device.startswith("cuda"):
        number = device.partition(":")[2] or "0"
        result["card"] = _output_of(
            "nvidia-smi", f"--id={number}", "--query-gpu=name,driver_version", "--format=csv,noheader"
        )
    return result


def commit() -> str | None:
    """The commit of the checkout that contains this package, with `+` if it has changes; None outside a checkout."""
    folder = str(Path(refengine.__file__).parent)
    name = _output_of("git", "-C", folder, "rev-parse", "--short", "HEAD")
    return name and name + ("+" if _output_of("git", "-C", folder, "status", "--porcelain", "-uno") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output_of(*command: str) -> str | None:
    """What a command prints; None if it fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
