"""What the commands of the command line do. Text and data go to stdout or to a file, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import refengine
from refengine.cli.console import (
    file_sha256,
    load_model,
    model_path,
    numerics_of,
    output_path,
    parse_ids,
    prompt_of,
    say,
    write,
    written,
)
from refengine.engine.engine import single_sequence
from refengine.engine.generation import Generation
from refengine.engine.sampling import SamplingParams
from refengine.errors import RefengineError, RequestError, one_line
from refengine.gguf.file import GGUFFile
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.tokenizer import load_tokenizer
from refengine.trace import Trace, Tracer, no_trace
from refengine.weights import check_tensors, quant_kind

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
    text, ids = prompt_of(arguments)
    model = load_model(arguments)
    tokenizer = model.vocabulary
    chat = arguments.chat
    if chat is None:
        chat = text is not None and tokenizer is not None and tokenizer.chat_template is not None
    if chat:
        if text is None or tokenizer is None:
            raise RequestError("--chat needs a prompt as text and a model with a vocabulary")
        prompt_ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    else:
        prompt_ids = model.prompt_ids(ids if text is None else text)
    trace = _tracer(arguments)
    engine, generation = single_sequence(
        model, prompt_ids, params, chunk=_chunk(arguments), trace=trace, graphs=not arguments.no_graphs
    )
    if arguments.echo or (arguments.echo is None and not chat and text is not None):
        write(text if text is not None else ",".join(map(str, prompt_ids)) + ":")
    reason = "interrupted"
    try:
        for token in engine.tokens(generation):
            # Without a vocabulary there is no text: ids then.
            write(token.text if tokenizer is not None else f" {token.id}")
            reason = token.stop_reason or reason
    finally:
        if generation.n_generated:
            write("\n")
        _print_statistics(model, generation, reason)
        engine.free(generation)
    _check_trace(trace)


def logits(arguments: argparse.Namespace) -> None:
    text, ids = prompt_of(arguments)
    output = output_path(arguments.output, ".npz")
    model = load_model(arguments)
    prompt_ids = model.prompt_ids(ids if text is None else text)
    trace = _tracer(arguments)
    result = model.forward(prompt_ids, trace=trace, chunk=_chunk(arguments))
    _check_trace(trace)
    with written(output) as temporary, open(temporary, "wb") as file:
        np.savez(file, ids=np.asarray(prompt_ids, dtype=np.int64), logits=result)
    say(f"{output}: logits {result.shape[0]} x {result.shape[1]} {result.dtype}, numerics {numerics_of(model)}")


def trace(arguments: argparse.Namespace) -> None:
    if arguments.output is None and not arguments.list:
        raise RequestError("give --output FILE.safetensors, or --list to see what there is")
    text, ids = prompt_of(arguments)
    output = None if arguments.list else output_path(arguments.output, ".safetensors")
    tracer = Trace(arguments.filter, watch=arguments.watch, breakpoints=arguments.breakpoints)
    model = load_model(arguments)
    prompt_ids = model.prompt_ids(ids if text is None else text)
    model.forward(prompt_ids, trace=tracer, chunk=_chunk(arguments))
    _check_trace(tracer)
    tensors = tracer.result()
    if not tensors:
        raise RequestError(f"no tensor matches --filter {arguments.filter!r}; `--list` shows all names")
    if output is None:
        for name, value in tensors.items():
            print(
                f"{name:28} {'x'.join(map(str, value.shape)):>18} {value.dtype}  "
                f"min {value.min():.6g} max {value.max():.6g}"
            )
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
    with written(output) as temporary:
        save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, temporary)
    with written(beside) as temporary:
        Path(temporary).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    say(f"{output}: {len(tensors)} tensors; manifest in {beside}")


def tokenize(arguments: argparse.Namespace) -> None:
    path = model_path(arguments.model)
    with GGUFFile(path) as gguf:
        tokenizer = load_tokenizer(gguf)
        if tokenizer is None:
            raise RequestError(f"{path} has no vocabulary")
        text = sys.stdin.read() if arguments.text in (None, "-") else arguments.text
        if arguments.decode:
            write(tokenizer.decode(parse_ids(text)) + "\n")
        else:
            ids = tokenizer.encode(text, add_special=arguments.special, parse_special=arguments.parse_special)
            print(json.dumps(ids))


def inspect(arguments: argparse.Namespace) -> None:
    if arguments.model and arguments.file:
        raise RequestError(f"give one GGUF file to inspect, not both {arguments.file} and {arguments.model}")
    with GGUFFile(model_path(arguments.model or arguments.file)) as gguf:
        by_type: dict[str, tuple[int, int]] = {}
        for info in gguf.tensors.values():
            count, size = by_type.get(info.type.name, (0, 0))
            by_type[info.type.name] = (count + 1, size + info.n_bytes)
        try:
            config = read_config(gguf)
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
    say(
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
