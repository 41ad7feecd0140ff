"""Record llama.cpp's logits and chosen tensors of the tiny models into golden/, through llama-cpp-python.

    python -m tools.make_golden             (all models of MODELS)
    python -m tools.make_golden llama-f32

One folder a model: `golden.safetensors` (logits of all positions, tensors in NumPy order), `manifest.json` (what made
it: model and seed, its sha256, llama-cpp-python's version, flags, ids). The models themselves are not kept: the same
specification and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SEED = 0
N_TOKENS = 24
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
)


def ids_of(n_vocab: int) -> list[int]:
    """A fixed prompt within any vocabulary."""
    return [(37 * i + 5) % n_vocab for i in range(N_TOKENS)]


def record(name: str, folder: Path) -> None:
    """Write golden/<name>. Raises RefengineError where llama-cpp-python is missing."""
    from safetensors.numpy import save_file

    from refengine.validate.llamacpp import LlamaCpp
    from tools.make_model import TINY, write_spec

    spec = TINY[name]
    kv_type = "f32" if spec.type == "F32" else "f16"
    ids = ids_of(spec.n_vocab)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"{name}.gguf"
        write_spec(path, spec, SEED)
        with LlamaCpp(path, kv_type=kv_type, n_threads=1) as peer:
            logits, tensors = peer.tensors(ids, TENSORS)
            version = peer.version
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"logits": logits, **tensors}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "golden.safetensors")
    manifest = {
        "engine": "llama.cpp",
        "llama_cpp_python": version,
        "model": name,
        "model_seed": SEED,
        "model_sha256": sha256,
        "flags": {"kv_type": kv_type, "flash_attention": False, "repack": False, "threads": 1, "device": "cpu"},
        "axis_order": "numpy",
        "ids": ids,
        "tensors": {k: list(v.shape) for k, v in arrays.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help=f"which to record (default: {', '.join(MODELS)})")
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
