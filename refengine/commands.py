"""What the commands of the command line do. Text and data go to stdout or to a file, everything else to stderr."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refengine
from refengine.config import ModelConfig
from refengine.engine.generation import Generation
from refengine.engine.sampling import SamplingParams
from refengine.errors import RefengineError, RequestError, one_line
from refengine.gguf_file import GGUFFile
from refengine.model import PACKAGED_MODEL, Model, load
from refengine.models import BY_ARCHITECTURE
from refengine.tokenizer import load_tokenizer
from refengine.trace import Trace, Tracer, no_trace
from refengine.weights import check_tensors, quant_kind

VALIDATION_PROMPT = "The quick brown fox jumps over the lazy dog. In 1984 there were 12,345 naïve ones — and you?"
SHOWN_ARRAY = 6  # elements of an array that `inspect` prints


def generate(arguments: argparse.Namespace) -> None:
    params = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
    )
    text, ids = _prompt(arguments)
    model = _load(arguments)
    tokenizer = model.tokenizer
    chat = arguments.chat
    if chat is None:
        chat = text is not None and tokenizer is not None and tokenizer.chat_template is not None
    if chat:
        if text is None or tokenizer is None:
            raise RequestError("--chat needs a prompt as text and a model with a vocabulary")
        rendered = tokenizer.render_chat([{"role": "user", "content": text}])
        prompt_ids = tokenizer.encode(rendered, add_special=False, parse_special=True)
    else:
        prompt_ids = model.prompt_ids(ids if text is None else text)
    trace = _tracer(arguments)
    generation = Generation(model, prompt_ids, params, chunk=_chunk(arguments), trace=trace)
    if arguments.echo or (arguments.echo is None and not chat and text is not None):
        _write(text if text is not None else ",".join(map(str, prompt_ids)) + ":")
    reason = "interrupted"
    try:
        for token in generation:
            # Without a vocabulary there is no text: ids then.
            _write(token.text if tokenizer is not None else f" {token.id}")
            reason = token.stop_reason or reason
    finally:
        if generation.n_generated:
            _write("\n")
        _print_statistics(model, generation, reason)
        generation.free()
    _check_trace(trace)


def logits(arguments: argparse.Namespace) -> None:
    text, ids = _prompt(arguments)
    output = _output_path(arguments.output, ".npz")
    model = _load(arguments)
    prompt_ids = model.prompt_ids(ids if text is None else text)
    trace = _tracer(arguments)
    result = model.forward(prompt_ids, trace=trace, chunk=_chunk(arguments))
    _check_trace(trace)
    with _written(output) as temporary, open(temporary, "wb") as file:
        np.savez(file, ids=np.asarray(prompt_ids, dtype=np.int64), logits=result)
    _say(f"{output}: logits {result.shape[0]} x {result.shape[1]} {result.dtype}, numerics {_numerics(model)}")


def trace(arguments: argparse.Namespace) -> None:
    if arguments.output is None and not arguments.list:
        raise RequestError("give --output FILE.safetensors, or --list to see what there is")
    text, ids = _prompt(arguments)
    output = None if arguments.list else _output_path(arguments.output, ".safetensors")
    tracer = Trace(arguments.filter, watch=arguments.watch, breakpoints=arguments.breakpoints)
    model = _load(arguments)
    prompt_ids = model.prompt_ids(ids if text is None else text)
    model.forward(prompt_ids, trace=tracer, chunk=_chunk(arguments))
    _check_trace(tracer)
    tensors = tracer.result()
    if not tensors:
        raise RequestError(f"no tensor matches --filter {arguments.filter!r}; `--list` shows all names")
    if output is None:
        for name, value in tensors.items():
            print(f"{name:28} {'x'.join(map(str, value.shape)):>18} {value.dtype}  "
                  f"min {value.min():.6g} max {value.max():.6g}")
        return
    from safetensors.numpy import save_file

    from refengine.validate.dump import manifest_of

    manifest = manifest_of(
        f"refengine {refengine.__version__}",
        prompt_ids,
        tensors,
        output.name,
        model_sha256=file_sha256(model.gguf.path),
        numerics=model.ops.numerics.name,
        flags={
            "model": model.gguf.path.name,
            "arch": model.config.arch,
            "kv_type": np.dtype(model.ops.numerics.kv_dtype).name,
            "device": model.device.name,
        },
    )
    beside = output.with_suffix(".manifest.json")
    with _written(output) as temporary:
        save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, temporary)
    with _written(beside) as temporary:
        Path(temporary).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _say(f"{output}: {len(tensors)} tensors; manifest in {beside}")


def validate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from refengine.validate.causes import likely_causes
    from refengine.validate.dump import NameMap, read_dump
    from refengine.validate.graft import graft
    from refengine.validate.judge import judge
    from refengine.validate.llamacpp import capture_llamacpp
    from refengine.validate.report_text import print_verdict, to_json

    output = None if arguments.json is None else _output_path(arguments.json, ".json")
    given = [v for v in (arguments.text, arguments.prompt, arguments.ids) if v is not None]
    if arguments.peer != "llama.cpp" and given:
        raise RequestError("a dump has its own prompt: leave yours out")
    model = _load(arguments)
    sha256 = file_sha256(model.gguf.path)
    if arguments.peer != "llama.cpp":
        names = NameMap.read(arguments.names) if arguments.names else NameMap()
        capture = read_dump(arguments.peer, names)
    else:
        if given:
            text, ids = _prompt(arguments)
            prompt_ids = model.prompt_ids(ids if text is None else text)
        elif model.tokenizer is not None:
            prompt_ids = model.prompt_ids(VALIDATION_PROMPT)
        else:
            prompt_ids = [i % model.config.n_vocab for i in range(1, 33)]
        model.check_ids(prompt_ids)
        kv_type = {"float16": "f16", "float32": "f32"}.get(np.dtype(model.ops.numerics.kv_dtype).name)
        if kv_type is None:
            raise RequestError("llama.cpp has no float64 KV cache: give --kv-type f16 or f32")
        _say(f"llama.cpp runs {len(prompt_ids)} tokens")
        capture = capture_llamacpp(
            model.gguf.path,
            prompt_ids,
            kv_type=kv_type,
            n_threads=arguments.threads,
            flash_attention=arguments.flash_attention,
            repack=arguments.repack,
        )
    verdict = judge(
        model,
        capture,
        tolerances=[_tolerance(text) for text in arguments.tolerance],
        model_sha256=None if arguments.any_model else sha256,
        progress=lambda stage: _say(f"judging: {stage}"),
    )
    first, causes, grafted = verdict.first_own_error, [], None
    if first is not None:
        _say(f"trying known mistakes on {first.name}")
        causes = likely_causes(model, verdict, first)
        grafted = graft(model, verdict, first.name)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    print_verdict(verdict, capture, console, causes, arguments.all, grafted)
    if output is not None:
        facts = {
            "refengine": refengine.__version__,
            "model": model.gguf.path.name,
            "model_sha256": sha256,
            "arch": model.config.arch,
            "numerics": model.ops.numerics.name,
            "kv_type": np.dtype(model.ops.numerics.kv_dtype).name,
        }
        with _written(output) as temporary:
            report = json.dumps(to_json(verdict, capture, facts, causes, grafted), indent=1)
            Path(temporary).write_text(report + "\n", encoding="utf-8")
        _say(f"{output}: the verdict with every figure")
    return verdict.exit_code


def _tolerance(text: str) -> tuple[str, float]:
    """`EXPRESSION=NMSE`."""
    pattern, _, value = text.rpartition("=")
    try:
        tolerance = float(value)
    except ValueError:
        tolerance = -1.0
    if not pattern or not tolerance >= 0.0:
        raise RequestError(f"--tolerance {text}: write EXPRESSION=NMSE, as ^ffn_down=1e-12")
    return pattern, tolerance


def tokenize(arguments: argparse.Namespace) -> None:
    path = _model_path(arguments.model)
    with GGUFFile(path) as gguf:
        tokenizer = load_tokenizer(gguf)
        if tokenizer is None:
            raise RequestError(f"{path} has no vocabulary")
        text = sys.stdin.read() if arguments.text in (None, "-") else arguments.text
        if arguments.decode:
            _write(tokenizer.decode(parse_ids(text)) + "\n")
        else:
            ids = tokenizer.encode(text, add_special=arguments.special, parse_special=arguments.parse_special)
            print(json.dumps(ids))


def inspect(arguments: argparse.Namespace) -> None:
    if arguments.model and arguments.file:
        raise RequestError(f"give one GGUF file to inspect, not both {arguments.file} and {arguments.model}")
    with GGUFFile(_model_path(arguments.model or arguments.file)) as gguf:
        by_type: dict[str, tuple[int, int]] = {}
        for info in gguf.tensors.values():
            count, size = by_type.get(info.type.name, (0, 0))
            by_type[info.type.name] = (count + 1, size + info.n_bytes)
        try:
            config = ModelConfig.from_gguf(gguf)
            check_tensors(gguf, BY_ARCHITECTURE[config.arch].tensors(config))
            load_tokenizer(gguf)
            runnable = "yes"
        except RefengineError as e:
            runnable = f"no: {e}"
        if arguments.json:
            print(json.dumps(_inspection(gguf, by_type, runnable), ensure_ascii=False))
            return
        n_parameters = sum(int(np.prod(i.shape)) for i in gguf.tensors.values())
        print(f"file          {gguf.path} ({_size(gguf.file_size)}, GGUF version {gguf.version})")
        print(f"quant_kind    {quant_kind(gguf)}")
        print(f"tensors       {len(gguf.tensors)} with {n_parameters:,} parameters")
        for name, (count, size) in sorted(by_type.items(), key=lambda item: -item[1][1]):
            print(f"  {name:8} {count:5} tensors  {_size(size)}")
        print(f"runs here     {one_line(runnable)}")
        print("metadata")
        for key, value in gguf.metadata.items():
            print(f"  {one_line(key)} = {_shown(value)}")


def parse_ids(text: str) -> list[int]:
    """`1,2,3`, `1 2 3` or `[1, 2, 3]`. Raises `RequestError`."""
    try:
        return [int(word) for word in text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()]
    except ValueError:
        raise RequestError(f"{text[:60]!r} is not a list of token ids; write them as 1,2,3") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, with a progress bar where it takes long."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file, _bar("hashing", total) as bar:
        while piece := file.read(8 << 20):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _prompt(arguments: argparse.Namespace) -> tuple[str | None, list[int]]:
    """The prompt as text, or None and ids. Exactly one way of giving it is allowed."""
    given = [v for v in (getattr(arguments, "text", None), arguments.prompt, arguments.ids) if v is not None]
    if len(given) != 1:
        raise RequestError(f"give the prompt once: as text or with --ids ({len(given)} were given)")
    if arguments.ids is not None:
        return None, parse_ids(arguments.ids)
    return sys.stdin.read() if given[0] == "-" else given[0], []


def _model_path(given: str | None) -> Path:
    """The file given, or the packaged one, of which the user is told."""
    if given is not None:
        return Path(given)
    _say("no --model given: using the packaged haiku model (try: Write a haiku about the ocean)")
    return PACKAGED_MODEL


def _load(arguments: argparse.Namespace) -> Model:
    path = _model_path(arguments.model)
    start = time.perf_counter()
    with _bar("loading", None) as bar:

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
            progress=progress,
        )
    reason = f" ({model.device.reason})" if arguments.device == "auto" else ""
    _say(
        f"{model.config.name[:100]}: {model.config.arch} {quant_kind(model.gguf)}, device {model.device.name}{reason}, "
        f"numerics {_numerics(model)}, loaded in {time.perf_counter() - start:.2f} s"
    )
    return model


def _numerics(model: Model) -> str:
    numerics = model.ops.numerics
    return f"{numerics.name}, KV cache {np.dtype(numerics.kv_dtype).name}"


def _chunk(arguments: argparse.Namespace) -> int:
    if arguments.chunk < 1:
        raise RequestError(f"--chunk {arguments.chunk} must be at least 1 token")
    return int(arguments.chunk)


def _tracer(arguments: argparse.Namespace) -> Tracer:
    if not arguments.breakpoints and not arguments.watch:
        return no_trace
    return Trace(watch=arguments.watch, breakpoints=arguments.breakpoints)


def _check_trace(tracer: Tracer) -> None:
    if isinstance(tracer, Trace):
        tracer.check_names()


def _print_statistics(model: Model, generation: Generation, reason: str) -> None:
    n = generation.n_generated
    decode = f", decode {(n - 1) / generation.decode_s:.1f} tokens/s" if n > 1 and generation.decode_s else ""
    prefill = f"{generation.n_prompt / generation.prefill_s:.1f} tokens/s" if generation.prefill_s else "-"
    _say(
        f"prompt {generation.n_prompt} tokens ({prefill}), {n} generated{decode}, first token after "
        f"{generation.prefill_s * 1000:.0f} ms, stop: {reason}, seed {generation.seed}"
    )


def _inspection(gguf: GGUFFile, by_type: dict[str, tuple[int, int]], runnable: str) -> dict[str, Any]:
    return {
        "file": str(gguf.path),
        "file_size": gguf.file_size,
        "version": gguf.version,
        "quant_kind": quant_kind(gguf),
        "runs_here": runnable,
        "types": {name: {"tensors": count, "bytes": size} for name, (count, size) in by_type.items()},
        "metadata": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in gguf.metadata.items()},
        "tensors": [
            {"name": i.name, "type": i.type.name, "shape": list(i.shape), "offset": i.offset, "bytes": i.n_bytes}
            for i in gguf.tensors.values()
        ],
    }


def _shown(value: Any) -> str:
    if isinstance(value, list | np.ndarray):
        head = ", ".join(repr(v) if isinstance(v, str) else str(v) for v in value[:SHOWN_ARRAY])
        return f"[{head}{', …' if len(value) > SHOWN_ARRAY else ''}] ({len(value)})"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}… ({len(text)} characters)"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def _output_path(given: str, suffix: str) -> Path:
    """Checked before the work starts, not after it."""
    path = Path(given)
    if path.suffix != suffix:
        raise RequestError(f"--output {given} must end in {suffix}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RequestError(f"--output {given}: folder {path.parent} does not exist or cannot be written")
    return path


@contextmanager
def _written(path: Path) -> Iterator[str]:
    """A temporary file beside `path` that takes its place when it is complete; an interruption leaves nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _bar(what: str, total: int | None) -> Any:
    """A progress bar on a terminal, shown once the work has taken a second."""
    return tqdm(
        desc=what, total=total, unit="B", unit_scale=True, delay=1.0, leave=False, disable=None, file=sys.stderr
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"refengine: {one_line(text)}", file=sys.stderr)

