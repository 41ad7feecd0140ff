"""The results as one HTML page, made from the JSON data. The page loads nothing; its plots are embedded SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from refengine.bench.speed import report_text
from refengine.bench.speed.record import Record
from refengine.errors import needs_extra

TEMPLATE = Path(__file__).parent / "report.html.j2"
COLOURS = {report_text.OURS: "#0b5fa5", report_text.PEER: "#d1661b"}  # told apart by the colour-blind too
MARKERS = {report_text.OURS: "o", report_text.PEER: "s"}
INK, FAINT = "#1b1f24", "#d0d7de"
WIDTH, HEIGHT = 4.4, 3.2  # inches: text of ten points is still large enough where a phone shows a plot
ROW_HEIGHT = 0.27  # inches, of a bar
MOST_BARS = 14


def check_plots() -> None:
    """Raises MissingLibraryError, which names the extra to install, if the plots cannot be drawn."""
    with needs_extra("bench", "refengine bench speed --html"):
        import matplotlib  # noqa: F401


def to_html(record: Record) -> str:
    """The page for the data of `record.record`. Text from the file is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    names = ("spread_text", "number", "gb_text", "facts_of", "left_out_lines")
    environment.filters |= {"plots": plots_of, "plots_of_profile": plots_of_profile}
    environment.filters.update({name: getattr(report_text, name) for name in names})
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        record=record,
        notes=report_text.NOTES,
        compare_note=report_text.COMPARE_NOTE,
        profile_notes=report_text.PROFILE_NOTES,
    )


def plots_of(model: Record) -> list[tuple[str, str]]:
    """The title and the SVG of each plot of a model."""
    sizes = model["measurements"]
    prompts = [size for size in sizes if size["kind"] == "prompt"]
    decodes = [size for size in sizes if size["kind"] == "decode"]
    shortest = min((size["depth"] for size in decodes), default=0)
    by_streams = sorted((s for s in decodes if s["depth"] == shortest), key=lambda s: int(s["streams"]))
    by_depth = sorted((s for s in decodes if s["streams"] == 1), key=lambda s: int(s["depth"]))
    found = [
        (f"Decode by streams, at depth {shortest:,}", lines(by_streams, "streams", "streams decoded together")),
        ("Decode of one stream by depth", lines(by_depth, "depth", "tokens in the KV cache before (depth)")),
        ("Prompts", lines(prompts, "n", "tokens of the prompt")),
    ]
    return [(title, svg) for title, svg in found if svg]


def plots_of_profile(profile: Record) -> list[tuple[str, str]]:
    """The title and the SVG of each plot of a profiled step."""
    found = [(f"Time by {profile['by']}", _bars_of_time(profile))]
    if any(row["share_of_copy"] is not None for row in profile["rows"]):
        found.append(("Share of a copy's bandwidth", _bars_of_bandwidth(profile)))
    return found


def lines(sizes: Sequence[Record], axis: str, label: str) -> str:
    """Tokens per second of each engine against one quantity, as SVG. Empty without sizes."""
    if not sizes:
        return ""
    figure, axes = _figure(HEIGHT)
    places = [size[axis] for size in sizes]
    even = range(len(places))  # evenly spaced, since the values are about powers of two
    for name in sizes[0]["engines"]:
        rates = [size["engines"][name]["tokens_per_s"] for size in sizes]
        middle = [rate["median"] for rate in rates]
        below = [rate["median"] - rate["lowest"] for rate in rates]
        above = [rate["highest"] - rate["median"] for rate in rates]
        axes.errorbar(
            even,
            middle,
            yerr=[below, above],
            label=name,
            color=COLOURS[name],
            marker=MARKERS[name],
            capsize=3,
            linewidth=1.8,
            markersize=5,
        )
    axes.set_xticks(even, [f"{place:,}" for place in places])
    axes.margins(x=0.12)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s, all streams" if axis == "streams" else "tokens/s")
    _legend(axes)
    return _svg(figure)


def _bars_of_time(profile: Record) -> str:
    rows = profile["rows"][:MOST_BARS]
    others = profile["rows"][MOST_BARS:]
    named = [(row["name"], row["seconds"], row["share_of_step"]) for row in rows]
    if others:
        shares = [sum(row[name] for row in others) for name in ("seconds", "share_of_step")]
        named.append((f"{len(others)} others", *shares))
    rest = profile["rest"]
    named.append((rest["name"], rest["seconds"], rest["share_of_step"]))
    unit, factor = ("ms", 1e3) if max(seconds for _, seconds, _ in named) >= 1e-3 else ("µs", 1e6)
    figure, axes = _figure(1.0 + ROW_HEIGHT * len(named))
    _bars(
        axes,
        [name for name, _, _ in named],
        [factor * seconds for _, seconds, _ in named],
        [f"{share:.0%}" for _, _, share in named],
    )
    axes.set_xlabel(f"time of a step ({unit}), and its share")
    return _svg(figure)


def _bars_of_bandwidth(profile: Record) -> str:
    rows = [row for row in profile["rows"] if row["share_of_copy"] is not None][:MOST_BARS]
    figure, axes = _figure(1.0 + ROW_HEIGHT * len(rows))
    shares = [100 * row["share_of_copy"] for row in rows]
    _bars(axes, [row["name"] for row in rows], shares, [f"{share:.0f}%" for share in shares])
    axes.axvline(100, color=INK, linewidth=1, linestyle="--", label="a copy")
    axes.set_xlabel("bytes per second, % of a copy's")
    _legend(axes)
    return _svg(figure)


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> None:
    places = range(len(names))
    drawn = axes.barh(places, values, color=COLOURS[report_text.OURS], height=0.7)
    axes.bar_label(drawn, texts, padding=3, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)


def _legend(axes: Any) -> None:
    """The legend, above the axes, where it covers no data."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _figure(height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an SVG element whose text is text. Identifiers that nothing refers to are left out: every plot
    has the same ones."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    return re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
