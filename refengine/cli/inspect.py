"""Implements `refengine inspect`: prints a file's metadata, types and sizes of its tensors, and whether it can run."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from refengine.cli.console import model_path
from refengine.errors import RefengineError, RequestError, one_line
from refengine.gguf.file import GGUFFile
from refengine.models import architecture_of, read_config
from refengine.tokenizer import load_tokenizer
from refengine.weights import check_tensors, quant_kind

SHOWN_ARRAY = 6  # how many elements of an array are printed


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
            check_tensors(gguf, architecture_of(gguf).tensors(config))
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
