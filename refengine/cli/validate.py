"""Implements `refengine validate`: compares one prompt with another engine, or many prompts on many models."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from rich.console import Console
from tqdm import tqdm

from refengine.cli.console import (
    file_sha256,
    load_model,
    model_path,
    output_path,
    prompt_of,
    say,
    write_json,
    write_text,
)
from refengine.errors import RequestError
from refengine.validate.corpus import Settings, read_prompts, run_corpus, summary_table
from refengine.validate.dump import NameMap
from refengine.validate.peers import capture_peer, default_ids, is_dump
from refengine.validate.report_html import to_html
from refengine.validate.report_json import to_json
from refengine.validate.report_text import print_outcome
from refengine.validate.run import validate as validate_capture


def validate(arguments: argparse.Namespace) -> int:
    if arguments.prompts is not None:
        return _corpus(arguments)
    if len(arguments.model or []) > 1:
        raise RequestError(f"{len(arguments.model)} models were given: only --prompts allows several")
    if arguments.output is not None or arguments.jobs != 1:
        raise RequestError("--output and --jobs need --prompts; for a single prompt use --json and --html")
    arguments.model = arguments.model[0] if arguments.model else None
    as_json = None if arguments.json is None else output_path(arguments.json, ".json", "--json")
    as_html = None if arguments.html is None else output_path(arguments.html, ".html", "--html")
    tolerances = [_tolerance(text) for text in arguments.tolerance]
    given = any(v is not None for v in (arguments.text, arguments.prompt, arguments.ids))
    if is_dump(arguments.peer) and given:
        raise RequestError("a dump contains its prompt: do not give another one")
    text, ids = prompt_of(arguments) if given else (None, [])
    model = load_model(arguments)
    sha256 = file_sha256(model.gguf.path)
    prompt = model.prompt_ids(ids if text is None else text) if given else default_ids(model)
    if not is_dump(arguments.peer):
        say(f"{arguments.peer} is running {len(prompt)} tokens")
    capture = capture_peer(
        arguments.peer,
        model,
        prompt,
        names=NameMap.read(arguments.names) if arguments.names else None,
        **_llamacpp(arguments),
    )
    outcome = validate_capture(
        model,
        capture,
        tolerances=tolerances,
        model_sha256=sha256,
        any_model=arguments.any_model,
        progress=lambda stage: say(f"judging: {stage}"),
    )
    print_outcome(outcome, _console(), arguments.all)
    report = to_json(outcome)
    if as_json is not None:
        write_json(as_json, report)
        say(f"{as_json}: the verdict with all numbers")
    if as_html is not None:
        write_text(as_html, to_html(report))
        say(f"{as_html}: the verdict, to open in a browser")
    return outcome.verdict.exit_code


def _corpus(arguments: argparse.Namespace) -> int:
    single = [arguments.text, arguments.prompt, arguments.ids, arguments.json, arguments.html, arguments.names]
    if any(v is not None for v in single) or is_dump(arguments.peer):
        raise RequestError("--prompts compares live engines; do not give a dump, a single prompt, --json or --html")
    if arguments.output is None:
        raise RequestError("--prompts needs --output RESULTS.jsonl, to which the results are appended")
    if arguments.jobs < 1:
        raise RequestError(f"--jobs {arguments.jobs} must be at least 1 process")
    output = output_path(arguments.output, ".jsonl")
    prompts = read_prompts(arguments.prompts)
    models = [model_path(m) for m in arguments.model] if arguments.model else [model_path(None)]
    settings = Settings(
        peer=arguments.peer,
        device=arguments.device,
        numerics=arguments.numerics,
        kv_type=arguments.kv_type,
        n_ctx=arguments.ctx,
        cpu_cache_mb=arguments.cpu_cache_mb,
        llamacpp=_llamacpp(arguments),
        tolerances=tuple(_tolerance(text) for text in arguments.tolerance),
    )
    # Every process multiplies matrices, so all of them together should use no more threads than there are cores.
    threads = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    for library in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, threads)
    total = len(models) * len(prompts)
    with tqdm(desc="validating", total=total, unit="run", disable=None, leave=False, file=sys.stderr) as bar:
        rows = run_corpus(models, prompts, settings, output, jobs=arguments.jobs, progress=bar.update)
    _console().print(summary_table(rows))
    failed = [row for row in rows if "error" in row]
    if failed:
        first = "{model} {prompt}: {error}".format(**failed[0])
        say(f"{len(failed)} of {len(rows)} runs failed; the first is {first}")
        return 2
    wrong = [row for row in rows if row["verdict"] != "agrees"]
    return 0 if not wrong else 3 if all(row["verdict"] == "nothing compared" for row in wrong) else 1


def _llamacpp(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "n_threads": arguments.threads,
        "n_ubatch": arguments.ubatch,
        "flash_attention": arguments.flash_attention,
        "repack": arguments.repack,
    }


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _tolerance(text: str) -> tuple[str, float]:
    """Parse `EXPRESSION=NMSE`. Raises RequestError."""
    pattern, _, value = text.rpartition("=")
    try:
        tolerance = float(value)
    except ValueError:
        tolerance = -1.0
    if not pattern or not tolerance >= 0.0:
        raise RequestError(f"--tolerance {text}: write EXPRESSION=NMSE, such as ^ffn_down=1e-12")
    return pattern, tolerance
