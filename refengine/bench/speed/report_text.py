"""The results as tables on a terminal, made from the JSON data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from refengine.bench.speed.baseline import Comparison
from refengine.bench.speed.record import Record

OURS, PEER = "refengine", "llama.cpp"
NOTES = (
    "Median (lowest–highest). Milliseconds: to the first token of a prompt, or of one decode step.",
    "GB/s: the bytes that a decode step must read at least (weights once, and the KV cache), in the types in which the "
    "engine keeps them, by the time of the step; and the share of a copy's bandwidth on this machine.",
)
COMPARE_NOTE = (
    "Ratio: refengine's tokens/s by llama.cpp's, pair by pair; above 1, refengine is faster. refengine's steps include "
    "scheduling and greedy sampling, llama.cpp's are llama_decode alone."
)
PROFILE_NOTES = {
    "kernel": "Graphs are off, kernels do not overlap, and events are recorded around each of them: these steps are "
    "longer than unprofiled ones.",
    "operation": "Every operation is timed by itself: these steps are a little longer than unprofiled ones.",
}


def show(record: Record, console: Console) -> None:
    """Print the tables of every model, and what was left out."""
    for model in record["models"]:
        _show_model(model, record, console)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print what became slower than in an earlier run."""
    table = Table(title="Compared with the earlier run, refengine's tokens/s", title_justify="left")
    table.add_column("model")
    table.add_column("what")
    for name in ("before", "now", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for change in comparison.changes:
        spreads = [spread_text(vars(spread)) for spread in (change.before, change.now)]
        verdict, style = ("slower", "bold red") if change.is_slower else ("", "")
        table.add_row(change.model, change.label, *spreads, f"{change.ratio:.2f}", verdict, style=style)
    console.print(table)
    for remark in comparison.remarks:
        console.print(remark, markup=False)


def facts_of(model: Record, record: Record) -> list[str]:
    """What ran, in short sentences."""
    ours = model["engines"][OURS]
    settings, sizes = record["settings"], record["settings"]["sizes"]
    lines = [
        f"{ours['architecture']} {ours['quant_kind']}, {ours['file_bytes'] / 1e6:,.0f} MB, on {ours['device']}; "
        f"numerics {ours['numerics']}, KV cache {ours['kv_type']}; threads: {settings['threads']}, tokens of a prompt "
        f"in one pass: {settings['chunk']}, rounds: {sizes['rounds']}, decode steps of a sample: {sizes['tokens']}",
        f"refengine {record['version']}" + (f" at {record['commit']}" if record["commit"] else ""),
    ]
    if PEER in model["engines"]:
        peer = model["engines"][PEER]
        lines[-1] += f", llama.cpp of {peer['version']} ({peer['system']})"
        if not peer["repack"]:
            lines[-1] += ", without repacked weights, since llama.cpp crashes with them on this processor"
    lines.append(f"{record['machine']}" + (f"; {record['card']}" if record.get("card") else ""))
    copied = model["copy_bytes_per_s"]
    low, high = copied["lowest"] / 1e9, copied["highest"] / 1e9
    lines.append(f"a copy reads and writes {copied['median'] / 1e9:.3g} ({low:.3g}–{high:.3g}) GB/s")
    for name, engine in model["engines"].items():
        lines.append(
            f"{name}: loaded in {engine['load_s']:.2f} s, {engine['peak_rss_bytes'] / 1e6:,.0f} MB of host memory at "
            f"the peak, {engine['idle_cpu_share']:.1%} of a core while it waited"
        )
    return lines


def left_out_lines(model: Record) -> list[str]:
    return [f"left out: {left['label']}: {left['reason']}" for left in model["left_out"]]


def spread_text(spread: Record) -> str:
    """`median (lowest–highest)`."""
    return f"{number(spread['median'])} ({number(spread['lowest'])}–{number(spread['highest'])})"


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def gb_text(engine: Record) -> str:
    """The bandwidth of a decode step and its share of a copy's; empty for a prompt."""
    if "bytes_per_s" not in engine:
        return ""
    return f"{number(engine['bytes_per_s'] / 1e9)} ({engine['share_of_copy']:.0%})"


def _show_model(model: Record, record: Record, console: Console) -> None:
    console.print(f"{model['model']}: {model['engines'][OURS]['name']}", markup=False, style="bold")
    for line in facts_of(model, record):
        console.print(line, markup=False)
    compares = PEER in model["engines"]
    table = Table()
    table.add_column("what")
    for name in model["engines"]:
        for heading in (f"{name}\ntokens/s", "\nms", "GB/s\n(of a copy)"):
            table.add_column(heading, justify="right")
    if compares:
        table.add_column("ratio", justify="right")
    for size in model["measurements"]:
        cells = [cell for engine in size["engines"].values() for cell in _cells(engine)]
        if compares:
            cells.append(_ratio_text(size["ratio"]))
        table.add_row(size["label"], *cells)
    console.print(table)
    for line in (*left_out_lines(model), *NOTES, *([COMPARE_NOTE] if compares else [])):
        console.print(line, markup=False)
    for profile in model["profiles"]:
        _show_profile(profile, console)
    console.print()


def _cells(engine: Record) -> tuple[str, str, str]:
    return spread_text(engine["tokens_per_s"]), number(engine["milliseconds"]["median"]), gb_text(engine)


def _ratio_text(ratio: Record) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"


def _show_profile(profile: Record, console: Console) -> None:
    title = (
        f"A step by {profile['by']}, {profile['label']}: {1e3 * profile['step_s']:.3g} ms "
        f"(unprofiled {1e3 * profile['unprofiled_step_s']:.3g} ms)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column(profile["by"])
    for name in ("calls", "µs", "of the step", "GB/s", "of a copy"):
        table.add_column(name, justify="right")
    for row in profile["rows"]:
        table.add_row(row["name"], f"{row['calls']:g}", *_profile_cells(row))
    rest = profile["rest"]
    table.add_row(rest["name"], "", *_profile_cells({**rest, "bytes_per_s": None}))
    console.print(table)
    console.print(PROFILE_NOTES[profile["by"]], markup=False)


def _profile_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    known = row["bytes_per_s"] is not None
    bandwidth = (number(row["bytes_per_s"] / 1e9), f"{row['share_of_copy']:.0%}") if known else ("", "")
    return number(1e6 * row["seconds"]), f"{row['share_of_step']:.1%}", *bandwidth
