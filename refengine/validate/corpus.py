"""Validates many prompts on many models in parallel processes. Each run adds a JSON line; finished runs are skipped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import refengine
from refengine.errors import RefengineError, RequestError, one_line
from refengine.model import Model
from refengine.validate.capture import sha256_of_file
from refengine.validate.peers import capture_peer
from refengine.validate.report_json import to_json
from refengine.validate.run import validate

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The settings of both engines: arguments of `refengine.load` and `capture_peer`. llamacpp: llama.cpp's options."""

    peer: str
    device: str = "cpu"
    numerics: str = "llamacpp"
    kv_type: str | None = None
    n_ctx: int | None = None
    cpu_cache_mb: int | None = 0
    llamacpp: dict[str, Any] = field(default_factory=dict)
    tolerances: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as text or ids. name: its `id` in the file, or its line number."""

    name: str
    value: str | list[int]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a JSONL file: each line is a string, a list of ids, or an object with `prompt` or `ids`, and maybe `id`.

    Raises RequestError, which names the line.
    """
    prompts: list[Prompt] = []
    # Lines end only at line feeds, because JSON strings may contain other separators.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise RequestError(f"{path}: line {number} is not JSON: {e}") from None
        entry = content if isinstance(content, dict) else {}
        value = entry.get("prompt", entry.get("ids")) if entry else content
        is_ids = isinstance(value, list) and all(type(i) is int for i in value)
        if not value or not (isinstance(value, str) or is_ids):
            raise RequestError(
                f"{path}: line {number} must be a string, a list of token ids, or an object with one of them as "
                f"`prompt` or `ids`: {line:.60}"
            )
        prompts.append(Prompt(one_line(str(entry.get("id", f"line {number}"))), value))
    if not prompts:
        raise RequestError(f"{path} has no prompt; write one prompt per line, as JSON")
    twice = [name for name, n in Counter(p.name for p in prompts).items() if n > 1]
    if twice:
        raise RequestError(f"{path}: two prompts have the id {twice[0]!r}")
    return prompts


def run_corpus(
    models: Sequence[Path],
    prompts: Sequence[Prompt],
    settings: Settings,
    output: Path,
    *,
    jobs: int = 1,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Row]:
    """Validate every prompt on every model; returns one row for each, in the order of models and prompts.

    Every row is appended to `output` as soon as it is finished. Rows that `output` already has for the same model file,
    prompt and settings are reused, so an interrupted run is resumed by starting it again. Failed runs are repeated.
    Raises RefengineError if a process dies.
    """
    hashes = {path: sha256_of_file(path) for path in models}
    tasks = {_key(hashes[path], prompt, settings): (path, prompt) for path in models for prompt in prompts}
    done = {key: row for key, row in _read_rows(output).items() if key in tasks}
    progress(len(done))
    open_tasks = [(key, *task) for key, task in tasks.items() if key not in done]
    # New processes instead of forks, because llama.cpp's threads and a GPU context do not survive a fork.
    context = multiprocessing.get_context("spawn")
    n_jobs = min(jobs, len(open_tasks))
    with open(output, "a", encoding="utf-8") as file:
        if n_jobs:
            with ProcessPoolExecutor(n_jobs, context) as pool:
                try:
                    waiting = {
                        pool.submit(_run, key, path, hashes[path], prompt, settings) for key, path, prompt in open_tasks
                    }
                    while waiting:
                        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        for future in finished:
                            row = future.result()
                            file.write(json.dumps(row) + "\n")
                            file.flush()
                            done[row["key"]] = row
                            progress(1)
                except BrokenProcessPool:
                    raise RefengineError(
                        f"a process died, perhaps for lack of memory; {output} keeps the {len(done)} results so far, "
                        "and the same command resumes from there (try fewer --jobs)"
                    ) from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [done[key] for key in tasks]


def _key(model_sha256: str, prompt: Prompt, settings: Settings) -> str:
    text = json.dumps([model_sha256, prompt.value, asdict(settings), refengine.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read_rows(output: Path) -> dict[str, Row]:
    """The rows of earlier runs, without failed ones, by key. An incomplete last line is removed from the file."""
    if not output.exists():
        return {}
    text = output.read_text(encoding="utf-8")
    rows: dict[str, Row] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            key = row["key"]
        except (ValueError, TypeError, KeyError):
            if number == len(text.splitlines()) and not text.endswith("\n"):
                with open(output, "r+", encoding="utf-8") as file:
                    file.truncate(len(text[: -len(line)].encode()))
                continue
            raise RequestError(f"{output}: line {number} is not a result of a corpus run: {line:.60}") from None
        if "error" not in row:
            rows[key] = row
    return rows


_loaded: tuple[Path, Settings, Model] | None = None  # each process keeps the model that it used last


def _run(key: str, path: Path, sha256: str, prompt: Prompt, settings: Settings) -> Row:
    start = time.perf_counter()
    row: Row = {"key": key, "model": path.name, "model_sha256": sha256, "prompt": prompt.name}
    try:
        model = _model(path, settings)
        ids = model.prompt_ids(prompt.value)
        capture = capture_peer(settings.peer, model, ids, **settings.llamacpp)
        outcome = validate(model, capture, tolerances=settings.tolerances, model_sha256=sha256)
    except RefengineError as e:
        return {**row, "error": one_line(str(e))}
    report, verdict = to_json(outcome), outcome.verdict
    logits, nearest = report["logits"], verdict.least_margin
    return {
        **row,
        **{name: report[name] for name in ("verdict", "first_own_error", "causes", "facts", "peer")},
        "n_tokens": len(ids),
        "n_tensors": len(verdict.tensors),
        "least_margin": nearest and {"name": nearest.name, "margin": min(nearest.margin, 1e308)},
        "logits": logits and {name: logits[name] for name in ("kl", "flips", "top1_agreement", "perplexity_ratio")},
        "seconds": round(time.perf_counter() - start, 3),
    }


def _model(path: Path, settings: Settings) -> Model:
    global _loaded
    if _loaded is None or _loaded[:2] != (path, settings):
        _loaded = None  # free it before loading the next
        model = refengine.load(
            path,
            settings.device,
            settings.numerics,
            kv_type=settings.kv_type,
            n_ctx=settings.n_ctx,
            cpu_cache_mb=settings.cpu_cache_mb,
        )
        _loaded = path, settings, model
    return _loaded[2]


def summary_table(rows: Sequence[Row]) -> Table:
    """A table with a line for every model: verdicts, the least margin of any tensor, KL over all positions, flips."""
    table = Table(title="agreement by model")
    headings = "model,type,prompts,agree,diverge,failed,least margin,KL mean,p99,max,flips"
    for heading in headings.split(","):
        table.add_column(heading, justify="left" if heading in ("model", "type") else "right")
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    for model, of_model in by_model.items():
        ran = [row for row in of_model if "error" not in row]
        kl = [value for row in ran if row["logits"] for value in row["logits"]["kl"] if value is not None]
        flips = [flip for row in ran if row["logits"] for flip in row["logits"]["flips"]]
        margin = min((row["least_margin"] for row in ran if row["least_margin"]), key=_margin, default=None)
        table.add_row(
            model,
            ran[0]["facts"]["quant_kind"] if ran else "",
            str(len(of_model)),
            str(sum(row["verdict"] == "agrees" for row in ran)),
            str(sum(row["verdict"] == "diverges" for row in ran)),
            str(len(of_model) - len(ran)),
            f"{_margin(margin):.1f} ({margin['name']})" if margin else "",
            *([f"{v:.1e}" for v in (np.mean(kl), np.percentile(kl, 99), max(kl))] if kl else ["", "", ""]),
            f"{len(flips)} ({sum(flip['is_tie'] for flip in flips)} ties)" if flips else "0",
        )
    return table


def _margin(entry: dict[str, Any]) -> float:
    return float(entry["margin"])
