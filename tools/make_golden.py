"""Records llama.cpp's logits and selected tensors of the tiny models and the packaged model in golden/.

    python -m tools.make_golden             (all models of MODELS)
    python -m tools.make_golden llama-f32

Uses llama-cpp-python. Each model has a folder with `golden.safetensors` (logits of all positions, tensors in NumPy
order) and `manifest.json` (model and seed, its sha256, llama-cpp-python's version, flags, ids). The tiny models are not
stored, because the same specification and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from refengine.api import load
from refengine.gguf.file import GGUFFile
from refengine.model import PACKAGED_MODEL
from refengine.models import read_config
from refengine.validate.capture import LOGITS
from refengine.validate.dump import manifest_of
from refengine.validate.llamacpp import LlamaCpp
from tools.make_model import TINY, write_spec

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SEED = 0
N_TOKENS = 24
PROMPT = "Write a haiku about GPU computing\nclocks in the green light\nno pipeline, only copper\n"
TENSORS = r"^(l_out|kqv_out)-\d+$|^result_norm$"
MODELS = (
    "llama-f32",
    "llama3-q4_k_m",
    "qwen2-q4_k_m",
    "qwen3-q4_k_m",
    "phi3-q4_k_m",
    "phi3-mostly_q4_0",
    "gpt-oss-mxfp4_moe",
    "gpt2-f32",
    "haiku-q4_k_m",  # the packaged one: trained weights
)


def ids_of(path: Path) -> list[int]:
    """A fixed prompt: ids from the whole vocabulary for a tiny model, text for the packaged model."""
    if path == PACKAGED_MODEL:
        tokenizer = load().tokenizer
        assert tokenizer is not None
        return tokenizer.encode(PROMPT)
    with GGUFFile(path) as gguf:
        n_vocab = read_config(gguf).n_vocab
    return [(37 * i + 5) % n_vocab for i in range(N_TOKENS)]


def model_file(name: str, folder: Path) -> Path:
    """The file of a model of MODELS: written to `folder`, or the packaged file."""
    if name == PACKAGED_MODEL.stem:
        return PACKAGED_MODEL
    write_spec(folder / f"{name}.gguf", TINY[name], SEED)
    return folder / f"{name}.gguf"


def record(name: str, folder: Path) -> None:
    """Write golden/<name>. Raises RefengineError if llama-cpp-python is missing."""
    kv_type = "f32" if name.endswith("f32") else "f16"
    with tempfile.TemporaryDirectory() as temporary:
        path = model_file(name, Path(temporary))
        ids = ids_of(path)
        with LlamaCpp(path, kv_type=kv_type, n_threads=1) as peer:
            logits, tensors = peer.tensors(ids, TENSORS)
            version = peer.version
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {**tensors, LOGITS: logits}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "golden.safetensors")
    run = {"kv_type": kv_type, "flash_attention": False, "repack": False, "threads": 1, "device": "cpu"}
    manifest = manifest_of(
        f"llama.cpp (llama-cpp-python {version})",
        ids,
        arrays,
        "golden.safetensors",
        model_sha256=sha256,
        flags={**run, "model": name, "model_seed": SEED},
    )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help=f"models to record (default: {', '.join(MODELS)})")
    parser.add_argument("--output", type=Path, default=GOLDEN, help="folder to write to (default: golden/)")
    args = parser.parse_args()
    unknown = set(args.model) - set(MODELS)
    if unknown:
        parser.error(f"not among the golden models: {', '.join(sorted(unknown))}")
    for name in args.model or MODELS:
        record(name, args.output / name)
        print(f"{args.output / name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
