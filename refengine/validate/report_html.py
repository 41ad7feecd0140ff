"""The verdict as one HTML page, made from the JSON report. The page loads nothing from the network."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jinja2

from refengine.validate.report_text import number

TEMPLATE = Path(__file__).parent / "report.html.j2"
LEVELS = 8  # number of colour levels
TINY = 1e-300  # for logarithms of 0

Report = dict[str, Any]


def to_html(report: Report) -> str:
    """The HTML page for the data of `report_json.to_json`. Text from other engines is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    environment.filters["value"] = lambda v: "NaN or infinite" if v is None else f"{v:.7g}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    tensors = report["tensors"]
    names = {t["name"]: i for i, t in enumerate(tensors)}
    first = report["first_own_error"]
    return template.render(
        report=report,
        first=tensors[names[first]] if first is not None else None,
        first_index=names.get(first),
        n_wrong=sum(t["own_error"] for t in tensors),
        nearest=min(tensors, key=lambda t: t["margin"] or math.inf, default=None),
        maps=[
            ("own", "Own error: each operation on the other engine's inputs", _heat_map(tensors, _own_level, "local")),
            ("total", "Total error: what has added up by then", _heat_map(tensors, _total_level, "total")),
        ],
        kl=_bars(report["logits"]),
    )


def _heat_map(tensors: list[Report], level: Any, which: str) -> dict[str, Any]:
    """The cells of a heat map: columns by tensor, rows by layer; tensors outside the layers are listed separately.

    which: `local` or `total` error.
    """
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, Report]] = {}
    for index, tensor in enumerate(tensors):
        kind, layer = _place(tensor["name"])
        if layer is not None:
            columns.setdefault(kind)
        value = tensor[which]["nmse"]
        bad = tensor[which]["nonfinite_mismatches"] > 0
        rows.setdefault(layer if layer is not None else "", {})[kind] = {
            "index": index,
            "name": tensor["name"],
            "text": "NaN" if bad else exponent(value),
            "level": LEVELS if bad else level(tensor),
            "words": f"{tensor['name']}: NMSE {number(value)}, allowed {number(tensor['threshold'])}",
            "own_error": tensor["own_error"],
        }
    outside = rows.pop("", {})
    ordered = sorted(rows.items(), key=lambda row: int(row[0]))
    return {
        "columns": list(columns),
        "rows": [(layer, [cells.get(column) for column in columns]) for layer, cells in ordered],
        "outside": list(outside.values()),
    }


def _place(name: str) -> tuple[str, str | None]:
    """`Qcur-3#0` → (`Qcur#0`, `3`); `result_norm` → (`result_norm`, None)."""
    match = re.fullmatch(r"(.+)-(\d+)((?:#\d+)?)", name)
    return (match[1] + match[3], match[2]) if match else (name, None)


def exponent(value: float | None) -> str:
    """The power of ten as text, for a narrow cell; a dot for an error of 0."""
    return "∞" if value is None else "·" if value == 0 else str(math.floor(math.log10(value)))


def _own_level(tensor: Report) -> int:
    """The colour level: 0 within the noise, above it one level per two orders of magnitude."""
    if not tensor["own_error"]:
        return 0
    ratio = (tensor["local"]["nmse"] or math.inf) / max(tensor["threshold"], TINY)
    return LEVELS if math.isinf(ratio) else min(LEVELS, 1 + int(math.log10(max(ratio, 1.0)) / 2))


def _total_level(tensor: Report) -> int:
    """The colour level: one per two orders of magnitude from 1e-16 to 1."""
    value = tensor["total"]["nmse"]
    return LEVELS if value is None else max(0, min(LEVELS, int((16 + math.log10(max(value, TINY))) / 2)))


def _bars(logits: Report | None) -> list[dict[str, Any]]:
    """The KL divergence of each position as a bar on a logarithmic scale from 1e-16 to 10 nats; height in per cent."""
    if logits is None:
        return []
    flipped = {flip["position"] for flip in logits["flips"]}
    bars = []
    for i, value in enumerate(logits["kl"]):
        position = logits["first_position"] + i
        height = 100.0 if value is None else max(0.5, min(100.0, (16 + math.log10(max(value, TINY))) / 17 * 100))
        bars.append({"position": position, "kl": value, "height": round(height, 1), "flip": position in flipped})
    return bars
