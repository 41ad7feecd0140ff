"""Writes GGUF models with random weights: tiny ones of every architecture and tensor type, or the full-size targets.

    python -m tools.make_model --list
    python -m tools.make_model qwen2-q4_k_m tiny.gguf
    python -m tools.make_model qwen2.5-0.5b big.gguf --vocab ggml-vocab-qwen2.gguf
    python -m tools.make_model llama Q5_1 odd.gguf --set n_layer=2 --set head_dim=48

The same specification and seed give the same bytes on every machine. Tensor data is generated and written in pieces of
a few MiB, so the largest model needs no more memory than the smallest.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from refengine.errors import RefengineError
from tools import model_vocab
from tools.model_specs import ModelSpec, metadata, tensors
from tools.model_weights import encode_floats, random_stream, random_tensor
from tools.model_zoo import FULL, IN_LLAMACPP, ONE_EACH, TINY, tiny

__all__ = ["FULL", "IN_LLAMACPP", "ONE_EACH", "TINY", "ModelSpec", "tiny", "write_model", "write_spec"]


def write_model(path: str | Path, arch: str, type: str, seed: int = 0, **overrides: Any) -> ModelSpec:
    """Write a small model of an architecture and type; overrides are fields of ModelSpec. Returns its spec."""
    return write_spec(path, tiny(arch, type, **overrides), seed)


def write_spec(
    path: str | Path, spec: ModelSpec, seed: int = 0, vocab_file: Path | None = None, progress: bool = False
) -> ModelSpec:
    """Write the model `spec` to `path`, with the tokenizer of `vocab_file` or a synthetic one. Returns `spec`."""
    if vocab_file is None:
        vocab = model_vocab.synthetic(spec.vocab, spec.n_vocab)
    else:
        vocab = model_vocab.copied(vocab_file, spec.n_vocab)
    writer = GGUFWriter(None, spec.arch)
    for entry in [*metadata(spec), *vocab]:
        writer.add_key_value(entry.key, entry.value, entry.type, entry.element)
    plan = list(tensors(spec))
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file(Path(path))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    bar = _progress_bar(sum(t.n_bytes for t in plan)) if progress else None
    try:
        writer.write_padding(file, file.tell())
        for tensor in plan:
            if tensor.values:
                pieces = iter([encode_floats(np.array(tensor.values, np.float32), tensor.type)])
            else:
                stream = random_stream(seed, tensor.name)
                pieces = random_tensor(stream, tensor.type, tensor.n_elements, tensor.std, tensor.mean)
            for piece in pieces:
                file.write(piece.data)
                if bar is not None:
                    bar.update(piece.size)
            writer.write_padding(file, tensor.n_bytes)
    finally:
        writer.close()
        if bar is not None:
            bar.close()
    return spec


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="writing", file=sys.stderr)


def describe(name: str, spec: ModelSpec) -> str:
    """One line of `--list`: size of the tensor data, and bytes by tensor type."""
    by_type: Counter[str] = Counter()
    for tensor in tensors(spec):
        by_type[tensor.type.name] += tensor.n_bytes
    total = sum(by_type.values())
    shares = ", ".join(f"{name} {100 * n / total:.0f}%" for name, n in by_type.most_common())
    shape = f"{spec.n_layer}x{spec.n_embd}, {spec.n_head}/{spec.n_head_kv}x{spec.head_dim}, ff {spec.n_ff}"
    return f"{name:28} {total / 1e6:9.2f} MB  {shape:34} {shares}"


def _override(text: str) -> tuple[str, Any]:
    """Parse `field=value`, with the value converted to the field's type."""
    key, _, value = text.partition("=")
    kinds = {f.name: str(f.type) for f in fields(ModelSpec) if f.name != "numbers"}
    if key not in kinds:
        raise argparse.ArgumentTypeError(f"unknown field {key!r}; known: {', '.join(kinds)}")
    try:
        if kinds[key] == "bool":
            return key, {"true": True, "false": False}[value.lower()]
        return key, {"int": int, "float": float, "str": str}[kinds[key]](value)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{key} is {kinds[key]}, got {value!r}") from None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="ARG", help="NAME OUTPUT, with a name of --list, or ARCHITECTURE TYPE OUTPUT"
    )
    parser.add_argument("--list", action="store_true", help="list the named models with their sizes, and exit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    parser.add_argument("--vocab", type=Path, metavar="FILE.gguf", help="copy the tokenizer of this file")
    parser.add_argument(
        "--set", type=_override, action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model"
    )
    args = parser.parse_args(argv)
    if not args.list and len(args.what) not in (2, 3):
        parser.error("give NAME OUTPUT, or ARCHITECTURE TYPE OUTPUT, or --list")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 with one line on stderr for an invalid argument."""
    args = _arguments(argv)
    if args.list:
        for name, spec in (FULL | TINY).items():
            print(describe(name, spec))
        return 0
    try:
        *what, output = args.what
        if len(what) == 2:
            spec = tiny(*what, **dict(args.set))
        elif what[0] in FULL | TINY:
            spec = replace((FULL | TINY)[what[0]], **dict(args.set))
        else:
            raise ValueError(f"unknown model {what[0]!r}; --list shows the known ones")
        write_spec(output, spec, args.seed, args.vocab, progress=True)
    except (ValueError, OSError, RefengineError) as e:
        print(f"make_model: {e}", file=sys.stderr)
        return 2
    print(describe(output, spec), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
