"""Implements `refengine bench speed`: measures the engine, beside llama.cpp if asked, and shows the results."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console

from refengine.bench.speed.baseline import Comparison, against
from refengine.bench.speed.llamacpp import check_installed
from refengine.bench.speed.record import read_record, record
from refengine.bench.speed.report_html import check_plots, to_html
from refengine.bench.speed.report_text import show, show_comparison
from refengine.bench.speed.run import ON_CPU, ON_GPU, Settings, Sizes, run_model
from refengine.cli.console import model_path, output_path, say, write_json, write_text
from refengine.errors import RequestError
from refengine.ops.dequant import usable_cpus

MOST_STREAMS = 1024


def bench_speed(arguments: argparse.Namespace) -> int:
    as_json = None if arguments.json is None else output_path(arguments.json, ".json", "--json")
    as_html = None if arguments.html is None else output_path(arguments.html, ".html", "--html")
    if as_html is not None:
        check_plots()
    baseline = None if arguments.baseline is None else read_record(Path(arguments.baseline))
    settings = _settings(arguments)
    paths = [model_path(given) for given in arguments.model or [None]]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise RequestError(f"--model: two files have the same name among {', '.join(names)}; results are told by it")
    results = [run_model(path, settings, say) for path in paths]
    found = record(results, settings, shlex.join(["refengine", *sys.argv[1:]]))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    show(found, console)
    if as_json is not None:
        write_json(as_json, found)
        say(f"{as_json}: all samples")
    if as_html is not None:
        write_text(as_html, to_html(found))
        say(f"{as_html}: tables and plots, to open in a browser")
    return 0 if baseline is None else _verdict(against(baseline, found), console)


def _verdict(comparison: Comparison, console: Console) -> int:
    """Show what became slower. Returns the exit code: 1 if anything did."""
    show_comparison(comparison, console)
    slower = comparison.slower
    say(f"{len(slower)} of {len(comparison.changes)} became slower than in the earlier run by more than both vary")
    for change in slower:
        say(f"slower: {change.text}")
    return 1 if slower else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """The settings that the arguments ask for. Raises RequestError for those out of range."""
    device = _device(arguments.device)
    if arguments.compare is not None and arguments.compare != "llama.cpp":
        raise RequestError(f"--compare {arguments.compare}: the only other engine is llama.cpp")
    if arguments.compare:
        check_installed()
    if arguments.compare and device == "host":
        raise RequestError("--compare llama.cpp needs device cpu or cuda: host, the kernels on the CPU, is for tests")
    return Settings(
        device=device,
        sizes=_sizes(arguments, ON_GPU if device.startswith("cuda") else ON_CPU),
        threads=_at_least_one("--threads", arguments.threads) or usable_cpus(),
        numerics=arguments.numerics,
        chunk=_at_least_one("--chunk", arguments.chunk) or Settings.chunk,
        compare=arguments.compare is not None,
        profile=arguments.profile,
    )


def _sizes(arguments: argparse.Namespace, default: Sizes) -> Sizes:
    return Sizes(
        prompts=_numbers("--prompts", arguments.prompts, 1) or default.prompts,
        depths=_numbers("--depths", arguments.depths, 0) or default.depths,
        streams=_numbers("--streams", arguments.streams, 1, MOST_STREAMS) or default.streams,
        tokens=_at_least_one("--tokens", arguments.tokens) or default.tokens,
        rounds=_at_least_one("--rounds", arguments.rounds) or default.rounds,
    )


def _device(given: str) -> str:
    """The name of a device. It is opened by the processes that measure, not here."""
    if not re.fullmatch(r"cpu|host|cuda(:\d{1,4})?", given):
        raise RequestError(f"--device {given}: choose cpu, cuda or cuda:N (host, the kernels on the CPU, is for tests)")
    return "cuda:0" if given == "cuda" else given


def _numbers(option: str, given: str | None, low: int, high: int = 1 << 20) -> tuple[int, ...] | None:
    """The numbers of a list such as `512,2048`, without repetitions. Raises RequestError."""
    if given is None:
        return None
    try:
        numbers = [int(word) for word in given.split(",")]
    except ValueError:
        raise RequestError(f"{option} {given!r} is not a list of whole numbers; write {option} 512,2048") from None
    wrong = [n for n in numbers if not low <= n <= high]
    if wrong:
        raise RequestError(f"{option} {given}: {wrong[0]} is not allowed; allowed are {low} to {high}")
    return tuple(dict.fromkeys(numbers))


def _at_least_one(option: str, given: int | None) -> int | None:
    if given is not None and given < 1:
        raise RequestError(f"{option} {given} must be at least 1")
    return given
