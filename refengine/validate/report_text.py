"""A verdict for people: the outcome first, then where to look, then what was compared; and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refengine.validate.capture import Capture
from refengine.validate.graft import Graft
from refengine.validate.judge import NOTHING_COMPARED, TensorVerdict, Verdict

SCHEMA_VERSION = 1
SHOWN = 12  # rows of the table, unless all are asked for


def print_verdict(
    verdict: Verdict,
    capture: Capture,
    console: Console,
    causes: Sequence[str] = (),
    show_all: bool = False,
    graft: Graft | None = None,
) -> None:
    """Print the verdict with the causes found; a table of the tensors in order, or of those that matter."""
    for style, line in headline(verdict, capture, causes):
        console.print(escape(line), style=style, highlight=False, soft_wrap=True)
    if verdict.tensors:
        console.print(_table(verdict, show_all))
    for line in _logit_lines(verdict) + _graft_lines(graft):
        console.print(escape(line), highlight=False, soft_wrap=True)


def headline(verdict: Verdict, capture: Capture, causes: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Lines with their styles, the verdict first."""
    n = len(verdict.tensors)
    first = verdict.first_own_error
    lines: list[tuple[str, str]] = []
    if verdict.exit_code == NOTHING_COMPARED:
        there = ", ".join(list(capture.tensors)[:5]) or "no tensor at all"
        lines.append(("bold red", f"NOTHING COMPARED: {capture.engine} has {there}; no name is one of ours"))
    elif first is not None:
        own = sum(t.own_error for t in verdict.tensors)
        lines.append(("bold red", f"DIVERGES: {first.name} is the first tensor with an error of its own"))
        lines.append(("", _where(first)))
        lines += [("bold", f"it is what comes out if {cause}") for cause in causes]
        lines.append(("", f"{own} of {n} tensors have an error of their own; what the others are off by is inherited"))
    else:
        nearest = verdict.least_margin
        assert nearest is not None
        inputs = f"each on the inputs that {capture.engine} had"
        lines.append(("bold green", f"AGREES: {n} tensors, {inputs}, are within noise"))
        if math.isfinite(nearest.margin):
            lines.append(
                ("", f"nearest to its limit: {nearest.name}, NMSE {nearest.local.nmse:.1e} of {nearest.threshold:.1e} "
                 f"allowed ({nearest.margin:.1f} times below)")
            )  # fmt: skip
    if not capture.complete:
        lines.append(("yellow", "the capture is incomplete: its engine stopped before it had finished writing"))
    if verdict.missing and verdict.tensors:
        named = ", ".join(verdict.missing[:4]) + (", …" if len(verdict.missing) > 4 else "")
        lines.append(("yellow", f"{len(verdict.missing)} of our tensors were not captured: {named}"))
    return lines


def _where(tensor: TensorVerdict) -> str:
    local = tensor.local
    worst = f"worst at {local.worst}: {local.worst_value:.7g}, should be {local.worst_reference:.7g}"
    if not local.finite:
        return f"{local.nonfinite_mismatches} of {local.size} values are NaN or infinite; {worst}"
    return f"on its own inputs: NMSE {local.nmse:.1e}, allowed {tensor.threshold:.1e}; {worst}"


def _table(verdict: Verdict, show_all: bool) -> Table:
    rows = list(verdict.tensors)
    if not show_all and len(rows) > SHOWN:
        first = verdict.first_own_error
        if first is not None:
            at = rows.index(first)
            rows = rows[max(0, at - 3) : max(0, at - 3) + SHOWN]
        else:
            nearest = set(sorted(rows, key=lambda t: t.margin)[:SHOWN])
            rows = [t for t in rows if t in nearest]
    table = Table(caption=None if show_all else f"{len(rows)} of {len(verdict.tensors)} tensors; --all shows the rest")
    for heading in ("tensor", "own error (NMSE)", "allowed", "total error (NMSE)", "max |error|", "ULP p99", ""):
        table.add_column(heading, justify="left" if heading in ("tensor", "") else "right", no_wrap=True)
    for t in rows:
        mark = "own error" if t.own_error else "inherited" if t.total.nmse > 4 * t.threshold else ""
        table.add_row(
            escape(t.name), _number(t.local.nmse), _number(t.threshold), _number(t.total.nmse),
            _number(t.total.max_abs), f"{t.local.ulp_p99:.0f}", mark, style="red" if t.own_error else None,
        )  # fmt: skip
    return table


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _logit_lines(verdict: Verdict) -> list[str]:
    logits = verdict.logits
    if logits is None:
        return ["logits: not captured for every position"] if verdict.tensors else []
    lines = [
        f"logits end to end: KL mean {logits.kl_mean:.1e}, p99 {logits.kl_p99:.1e}, max {logits.kl_max:.1e} nats; "
        f"same likeliest token at {logits.top1_agreement:.1%} of {len(logits.kl)} positions"
    ]
    for flip in logits.flips[:3]:
        lines.append(
            f"  position {flip.position}: token {flip.token} instead of {flip.reference_token}, which we put "
            f"{flip.margin:.2g} above it"
        )
    if len(logits.flips) > 3:
        lines.append(f"  and {len(logits.flips) - 3} more")
    return lines


def _graft_lines(graft: Graft | None) -> list[str]:
    if graft is None:
        return []
    alone, others = graft.alone, graft.others
    return [
        f"the error of {graft.name} alone, in our run: KL mean {alone.kl_mean:.1e}, max {alone.kl_max:.1e} nats; "
        f"without it {others.kl_mean:.1e} and {others.kl_max:.1e} are left"
    ]


def to_json(
    verdict: Verdict,
    capture: Capture,
    facts: dict[str, Any],
    causes: Sequence[str] = (),
    graft: Graft | None = None,
) -> dict[str, Any]:
    """The verdict as JSON data: schema `refengine-verdict`. Numbers that JSON lacks are null."""
    first = verdict.first_own_error
    return _plain({
        "schema": "refengine-verdict",
        "schema_version": SCHEMA_VERSION,
        "verdict": {0: "agrees", 1: "diverges", 3: "nothing compared"}[verdict.exit_code],
        "first_own_error": first.name if first else None,
        "causes": list(causes),
        "graft": None if graft is None else asdict(graft),
        "facts": facts,
        "peer": {
            "engine": capture.engine,
            "source": capture.source.name,
            "numerics": capture.numerics,
            "flags": dict(capture.flags),
            "complete": capture.complete,
        },
        "ids": capture.ids,
        "tensors": [
            {
                "name": t.name,
                "own_error": t.own_error,
                "floor": t.floor,
                "threshold": t.threshold,
                "local": asdict(t.local),
                "total": asdict(t.total),
            }
            for t in verdict.tensors
        ],
        "missing": list(verdict.missing),
        "unknown": list(verdict.unknown),
        "logits": None if verdict.logits is None else asdict(verdict.logits),
    })  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
