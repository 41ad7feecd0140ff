"""Functions that several commands share: read the model, prompt and trace from the arguments, write files, messages."""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refengine.api import load
from refengine.errors import RequestError, one_line
from refengine.hub.files import resolve
from refengine.model import PACKAGED_MODEL, Model
from refengine.trace import Trace, Tracer, no_trace
from refengine.validate.capture import sha256_of_file
from refengine.weights import quant_kind


def parse_ids(text: str) -> list[int]:
    """Parse token ids written as `1,2,3`, `1 2 3` or `[1, 2, 3]`. Raises `RequestError`."""
    try:
        return [int(word) for word in text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()]
    except ValueError:
        raise RequestError(f"{text[:60]!r} is not a list of token ids; write them as 1,2,3") from None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, with a progress bar if it takes long."""
    with progress_bar("hashing", path.stat().st_size) as bar:
        return sha256_of_file(path, bar.update)


def prompt_of(arguments: argparse.Namespace) -> tuple[str | None, list[int]]:
    """The prompt as (text, []) or (None, ids). Raises RequestError unless it is given in exactly one way.

    `@FILE` reads a file, `-` reads standard input, which is also read if it is a pipe and no prompt is given.
    """
    given = [v for v in (getattr(arguments, "text", None), arguments.prompt, arguments.ids) if v is not None]
    if not given and _is_piped(sys.stdin):
        given = ["-"]
    if len(given) != 1:
        raise RequestError(f"give the prompt once: as text or with --ids ({len(given)} were given)")
    if arguments.ids is not None:
        return None, parse_ids(arguments.ids)
    text = given[0]
    if text == "-":
        read = sys.stdin.read()
        if not read:
            raise RequestError("standard input is empty: give the prompt as text, as @FILE or with --ids")
        return read, []
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        try:
            return path.read_text(encoding="utf-8"), []
        except OSError as e:
            raise RequestError(f"the prompt file {path} cannot be read: {e.strerror or e}") from None
        except UnicodeDecodeError:
            raise RequestError(f"the prompt file {path} is not UTF-8 text") from None
    return text, []


def _is_piped(stream: Any) -> bool:
    """Whether a stream is a pipe, a socket or a file, and not a terminal."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # the stream is None, closed or replaced
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def model_path(given: str | None) -> Path:
    """The model file of a path or a hub name. None: the packaged model, with a message to the user."""
    if given is not None:
        return checked_model_path(given)
    say("no --model given: using the packaged haiku model (try: Write a haiku about the ocean)")
    return PACKAGED_MODEL


def checked_model_path(given: str) -> Path:
    """The model file of a path or a hub name. Raises RequestError, which says what to do, if it is neither."""
    if given.startswith("hf:"):
        return resolve(given, say)
    path = Path(given).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        if not inside:
            raise RequestError(f"{path} is a directory without a GGUF file: give the path of a .gguf file")
        raise RequestError(f"{path} is a directory: give one of its files, {', '.join(inside[:5])}")
    if path.suffix == ".safetensors":
        raise RequestError(f"{path} is a safetensors file: convert it with llama.cpp's convert_hf_to_gguf.py first")
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[^/]+)?", given) and not path.parent.is_dir():
        raise RequestError(f"{given} is not a file: for the model with this name on the hub, give hf:{given}")
    return path


def chunk(arguments: argparse.Namespace) -> int:
    """The number of prompt tokens in one forward pass. Raises RequestError if it is below 1."""
    if arguments.chunk < 1:
        raise RequestError(f"--chunk {arguments.chunk} must be at least 1 token")
    return int(arguments.chunk)


def tracer(arguments: argparse.Namespace) -> Tracer:
    """The tracer for `--break` and `--watch`."""
    if not arguments.breakpoints and not arguments.watch:
        return no_trace
    return Trace(watch=arguments.watch, breakpoints=arguments.breakpoints)


def check_trace(tracer: Tracer) -> None:
    """Called after a run. Raises TraceError if a requested tensor has not occurred."""
    if isinstance(tracer, Trace):
        tracer.check_names()


def load_model(arguments: argparse.Namespace) -> Model:
    """Load the model that the arguments name, with a progress bar and a message."""
    path = model_path(arguments.model)
    start = time.perf_counter()
    with progress_bar("loading", None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = load(
            path,
            arguments.device,
            arguments.numerics,
            kv_type=arguments.kv_type,
            n_ctx=arguments.ctx,
            cpu_cache_mb=arguments.cpu_cache_mb,
            attention=getattr(arguments, "attention", "flash"),
            progress=progress,
        )
    if model.n_ctx > model.config.n_ctx_train:
        say(
            f"warning: --ctx {model.n_ctx} is more than the {model.config.n_ctx_train} tokens that the model was "
            "trained for; expect nonsense beyond them"
        )
    reason = f" ({model.device.reason})" if arguments.device in ("auto", "host") else ""
    say(
        f"{model.config.name[:100]}: {model.config.arch} {quant_kind(model.gguf)}, device {model.device.name}{reason}, "
        f"numerics {numerics_of(model)}, loaded in {time.perf_counter() - start:.2f} s{_dequantized(model)}"
    )
    return model


def _dequantized(model: Model) -> str:
    """The part of the message about loading that says how long dequantising the weights took."""
    done = model.dequantized
    if done is None or not done.n_weights:
        return ""
    return f", of which {done.seconds:.2f} s dequantising {done.n_weights / 1e6:.3g} M weights"


def numerics_of(model: Model) -> str:
    numerics = model.ops.numerics
    return f"{numerics.name}, KV cache {np.dtype(numerics.kv_dtype).name}"


def output_path(given: str, suffix: str, option: str = "--output") -> Path:
    """The path of an output file, checked before the work starts. Raises RequestError."""
    path = Path(given)
    if path.suffix != suffix:
        raise RequestError(f"{option} {given} must end in {suffix}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RequestError(f"{option} {given}: folder {path.parent} does not exist or cannot be written")
    return path


@contextmanager
def written(path: Path) -> Iterator[str]:
    """Gives a temporary file that replaces `path` when the context ends; after an exception it is deleted."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole; see `written`."""
    with written(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON that appears whole; see `written`."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def progress_bar(what: str, total: int | None, unit: str = "B") -> Any:
    """A progress bar, shown only on a terminal and after one second."""
    return tqdm(
        desc=what, total=total, unit=unit, unit_scale=True, delay=1.0, leave=False, disable=None, file=sys.stderr
    )


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    print(f"refengine: {one_line(text)}", file=sys.stderr)
