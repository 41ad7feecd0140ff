"""Prints a verdict as text: first the outcome, then where to look, then what was compared."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refengine.validate.graft import Graft
from refengine.validate.judge import NOTHING_COMPARED, TensorVerdict, Verdict
from refengine.validate.metrics import Flip
from refengine.validate.run import Outcome

SHOWN = 12  # rows of the table, unless all are requested


def print_outcome(outcome: Outcome, console: Console, show_all: bool = False) -> None:
    """Print the verdict with its causes, and a table of the tensors: all in order, or only the relevant ones."""
    verdict = outcome.verdict
    for style, line in headline(outcome):
        console.print(escape(line), style=style, highlight=False, soft_wrap=True)
    if verdict.tensors:
        console.print(_table(verdict, show_all, console.width))
    for line in _layout_lines(verdict) + _logit_lines(verdict) + _graft_lines(outcome.graft):
        console.print(escape(line), highlight=False, soft_wrap=True)


def headline(outcome: Outcome) -> list[tuple[str, str]]:
    """Lines with their styles (for rich), the verdict first."""
    verdict, capture = outcome.verdict, outcome.verdict.capture
    n = len(verdict.tensors)
    first = verdict.first_own_error
    lines: list[tuple[str, str]] = []
    if verdict.exit_code == NOTHING_COMPARED:
        names = ", ".join(list(capture.tensors)[:5]) or "no tensor at all"
        lines.append(("bold red", f"NOTHING COMPARED: {capture.engine} has {names}; no name is one of ours"))
    elif first is not None:
        own = sum(t.own_error for t in verdict.tensors)
        lines.append(("bold red", f"DIVERGES: {first.name} is the first tensor with an error of its own"))
        lines.append(("", _where(first) + (f"; {outcome.where}" if outcome.where else "")))
        lines += [("bold", f"it is what comes out if {cause}") for cause in outcome.causes]
        lines.append(("", f"{own} of {n} tensors have an error of their own; what the others are off by is inherited"))
    else:
        nearest = verdict.least_margin
        assert nearest is not None
        inputs = f"each on the inputs that {capture.engine} had"
        lines.append(("bold green", f"AGREES: {n} tensors, {inputs}, are within noise"))
        if math.isfinite(nearest.margin):
            lines.append(
                ("", f"nearest to its limit: {nearest.name}, NMSE {nearest.local.nmse:.1e} of {nearest.threshold:.1e} "
                 f"allowed ({nearest.margin:.1f} times below; measured noise floor {nearest.floor:.1e})")
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


def _table(verdict: Verdict, show_all: bool, width: int) -> Table:
    """The table, with as many columns as fit into the width; numbers are never truncated."""
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
    columns: list[tuple[str, Callable[[TensorVerdict], str]]] = [
        ("own error\n(NMSE)", lambda t: number(t.local.nmse)),
        ("\nallowed", lambda t: number(t.threshold)),
        ("total error\n(NMSE)", lambda t: number(t.total.nmse)),
        ("\nmax |error|", lambda t: number(t.total.max_abs)),
        ("\nULP p99", lambda t: f"{t.local.ulp_p99:.0f}"),
    ]
    marks = ["own error" if t.own_error else "inherited" if t.total.nmse > 4 * t.threshold else "" for t in rows]
    names = max((len(t.name) for t in rows), default=0)
    # A column is as wide as its longest line, two spaces and a rule. The rightmost columns are dropped if it is narrow.
    while len(columns) > 3:
        cells = [max(max(map(len, h.split("\n"))), *(len(f(t)) for t in rows)) for h, f in columns]
        if 1 + names + sum(cells) + len("own error") + 3 * (len(columns) + 2) <= width:
            break
        columns.pop()
    table.add_column("\ntensor", overflow="fold")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split("\n"))))
    table.add_column("", no_wrap=True, min_width=len("own error"))
    for t, mark in zip(rows, marks, strict=True):
        style = "red" if t.own_error else None
        table.add_row(escape(t.name), *(figure(t) for _, figure in columns), mark, style=style)
    return table


def number(value: float | None) -> str:
    """A number with two digits. None, JSON's null, stands for NaN and infinity."""
    return "not finite" if value is None else "0" if value == 0 else f"{value:.1e}"


def _logit_lines(verdict: Verdict) -> list[str]:
    logits = verdict.logits
    if logits is None:
        return ["logits: not captured for every position"] if verdict.tensors else []
    lines = [
        f"logits end to end: KL mean {logits.kl_mean:.1e}, p99 {logits.kl_p99:.1e}, max {logits.kl_max:.1e} nats; "
        f"same likeliest token at {logits.top1_agreement:.1%} of {len(logits.kl)} positions"
    ]
    lines += [f"  {flip_words(flip)}" for flip in logits.flips[:3]]
    if len(logits.flips) > 3:
        ties = sum(flip.is_tie for flip in logits.flips[3:])
        lines.append(f"  and {len(logits.flips) - 3} more, {ties} of them ties")
    return lines


def flip_words(flip: Flip) -> str:
    """A position at which the most likely token differs, as text, and whether rounding explains it."""
    told = f"position {flip.position}: token {flip.token} instead of {flip.reference_token}, which we put "
    if flip.is_tie:
        return told + f"{flip.margin:.2g} above it: a tie, as rounding moves logits there by {flip.bound:.2g}"
    return told + f"{flip.margin:.2g} above it: more than rounding moves logits there ({flip.bound:.2g})"


def _layout_lines(verdict: Verdict) -> list[str]:
    """The layouts that differ from ours, each with its tensors, as text."""
    by_layout: dict[str, list[str]] = {}
    for t in verdict.tensors:
        if t.layout:
            by_layout.setdefault(t.layout, []).append(t.name)
    return [
        f"taken as {layout}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for layout, names in by_layout.items()
    ]


def _graft_lines(graft: Graft | None) -> list[str]:
    if graft is None:
        return []
    alone, others = graft.alone, graft.others
    return [
        f"the error of {graft.name} alone, in our run: KL mean {alone.kl_mean:.1e}, max {alone.kl_max:.1e} nats; "
        f"without it {others.kl_mean:.1e} and {others.kl_max:.1e} are left"
    ]
