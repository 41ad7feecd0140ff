"""Turn the kept checkpoints of the haiku models into GGUF files.

    python -m tools.haiku.export FOLDER                 # all of them
    python -m tools.haiku.export FOLDER haiku-q4_k_m haiku-experts-mxfp4

F32 files are the checkpoint's values as they are (float16 in the checkpoint). The others are made by llama.cpp's own
quantiser, through llama-cpp-python (`pip install -e '.[validate]'`). `haiku-q4_k_m` is what refengine ships.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter, LlamaFileType
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from refengine.errors import RefengineError
from refengine.validate.llamacpp import quantize
from tools.haiku import vocabulary
from tools.haiku.specs import SPECS
from tools.model_specs import ModelSpec, metadata, tensors
from tools.model_vocab import Entry

CHECKPOINT = Path(__file__).parent / "checkpoint"
SHARD_BYTES = 4_000_000  # of a kept checkpoint's files

# Of the mixture of experts, MXFP4 takes the experts and Q8_0 the rest, as in the published gpt-oss files.
FILES: dict[str, tuple[str, LlamaFileType]] = {
    "haiku-f32": ("dense", LlamaFileType.ALL_F32),
    "haiku-q8_0": ("dense", LlamaFileType.MOSTLY_Q8_0),
    "haiku-q4_k_m": ("dense", LlamaFileType.MOSTLY_Q4_K_M),
    "haiku-q4_0": ("dense", LlamaFileType.MOSTLY_Q4_0),
    "haiku-experts-f32": ("experts", LlamaFileType.ALL_F32),
    "haiku-experts-mxfp4": ("experts", LlamaFileType.MOSTLY_MXFP4_MOE),
}


def export(name: str, folder: Path, checkpoint: Path = CHECKPOINT) -> Path:
    """Write the file `name` (a key of FILES) to `folder/name.gguf` and return its path.

    Raises KeyError for another name, FileNotFoundError without a checkpoint, RefengineError where the quantiser fails.
    """
    model, file_type = FILES[name]
    output = folder / f"{name}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if file_type == LlamaFileType.ALL_F32:
        write_gguf(output, SPECS[model], load_checkpoint(model, checkpoint), checkpoint / "tokenizer.json")
        return output
    with tempfile.TemporaryDirectory() as temporary:
        full = Path(temporary) / "f32.gguf"
        write_gguf(full, SPECS[model], load_checkpoint(model, checkpoint), checkpoint / "tokenizer.json")
        quantize(full, output, file_type)
    return output


def load_checkpoint(model: str, folder: Path = CHECKPOINT) -> dict[str, np.ndarray]:
    """The parameters of `model` by GGUF name, float16, from its `MODEL-*.safetensors`."""
    shards = sorted(folder.glob(f"{model}-*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no {model}-*.safetensors in {folder}: train it with tools/haiku/train.py")
    return {name: value for shard in shards for name, value in load_file(shard).items()}


def keep_checkpoint(run: Path, model: str, folder: Path = CHECKPOINT) -> list[Path]:
    """Store a training run's `model.safetensors` in `folder`, in files of at most SHARD_BYTES. Returns their paths."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, value in sorted(load_file(run / "model.safetensors").items()):
        if sum(v.nbytes for v in shards[-1].values()) + value.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{model}-*.safetensors"):
        old.unlink()
    paths = [folder / f"{model}-{i + 1}-of-{len(shards)}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)
    return paths


def write_gguf(path: Path, spec: ModelSpec, weights: Mapping[str, np.ndarray], tokenizer: Path) -> None:
    """Write a float32 GGUF file. Raises ValueError where the weights are not those of `spec`."""
    wanted = {t.name: t.shape for t in tensors(spec)}
    found = {name: value.shape for name, value in weights.items()}
    if wanted != found:
        unlike = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise ValueError(f"the checkpoint is not of this model; first difference: {unlike[0]}")
    origin = [
        Entry("general.license", "mit", GGUFValueType.STRING),
        Entry("general.description", "Writes haiku. Trained by tools/haiku of refengine.", GGUFValueType.STRING),
    ]
    writer = GGUFWriter(path, spec.arch)
    for entry in [*metadata(spec), *origin, *vocabulary.entries(Tokenizer.from_file(str(tokenizer)))]:
        writer.add_key_value(entry.key, entry.value, entry.type, entry.element)
    for name in wanted:
        writer.add_tensor(name, np.ascontiguousarray(weights[name], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the .gguf files go")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(FILES)}")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="FOLDER")
    parser.add_argument(
        "--keep", nargs=2, action="append", default=[], metavar=("RUN", "MODEL"),
        help="first store the result of a training run as the checkpoint of MODEL (dense, experts)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    unknown = [n for n in args.names if n not in FILES]
    if unknown:
        parser.error(f"unknown file {unknown[0]!r}; known: {', '.join(FILES)}")
    try:
        for run, model in args.keep:
            print("\n".join(map(str, keep_checkpoint(Path(run), model, args.checkpoint))), file=sys.stderr)
        for name in args.names or FILES:
            path = export(name, args.folder, args.checkpoint)
            print(f"{path}  {path.stat().st_size:,} bytes", file=sys.stderr)
    except (OSError, RefengineError, ValueError) as e:
        print(f"export: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
