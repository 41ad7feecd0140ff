"""Implements `refengine trace`: writes or lists the intermediate tensors of a prompt."""

from __future__ import annotations

import argparse

import numpy as np

import refengine
from refengine.cli.console import (
    check_trace,
    chunk,
    file_sha256,
    load_model,
    output_path,
    progress_bar,
    prompt_of,
    say,
    write_json,
    written,
)
from refengine.errors import RequestError
from refengine.trace import Trace


def trace(arguments: argparse.Namespace) -> None:
    if arguments.output is None and not arguments.list:
        raise RequestError("give --output FILE.safetensors, or --list to see the names of all tensors")
    text, ids = prompt_of(arguments)
    output = None if arguments.list else output_path(arguments.output, ".safetensors")
    recorder = Trace(arguments.filter, watch=arguments.watch, breakpoints=arguments.breakpoints)
    model = load_model(arguments)
    prompt_ids = model.prompt_ids(ids if text is None else text)
    with progress_bar("prompt", len(prompt_ids), "token") as bar:
        model.forward(prompt_ids, trace=recorder, chunk=chunk(arguments), progress=bar.update)
    check_trace(recorder)
    tensors = recorder.result()
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
    manifest_path = output.with_suffix(".manifest.json")
    with written(output) as temporary:
        save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, temporary)
    write_json(manifest_path, manifest)
    say(f"{output}: {len(tensors)} tensors; manifest in {manifest_path}")
