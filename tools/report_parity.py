"""Measures the distances of refengine from llama.cpp, and of llama.cpp from exact results; for golden/README.md.

    python -m tools.report_parity [--kernels host|cuda]

For the tiny models and the trained haiku models: with numerics `llamacpp`, the NMSE end to end, and of the worst single
operation on llama.cpp's own inputs; then the NMSE and KL divergence of llama.cpp's logits from `exact`, which show
llama.cpp's own rounding. Medians of five prompts. With --kernels: the distances of the kernels' logits from `exact`,
and those of llama.cpp's CPU backend on the same prompts (omitted if llama-cpp-python is not installed).
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np

import refengine
from refengine.validate.llamacpp import LlamaCpp
from refengine.validate.metrics import nmse
from refengine.validate.replay import replay
from tools.haiku.corpus import Corpus
from tools.haiku.export import FILES, export
from tools.make_model import TINY, write_spec

N_TOKENS = 48
MODELS = (
    *("llama-f32", "qwen2-f32", "qwen3-f32", "phi3-f32", "gpt-oss-f32", "gpt2-f32"),
    *("llama-f16", "llama-bf16", "llama-q4_0", "llama-q4_1", "llama-q5_0", "llama-q5_1", "llama-q8_0"),
    *("llama-q4_k", "llama-q5_k", "llama-q6_k", "llama-mxfp4"),
    *("qwen2-q4_k_m", "qwen2-mostly_q4_0", "qwen3-q4_k_m", "phi3-q4_k_m", "phi3-mostly_q4_0", "gpt-oss-mxfp4_moe"),
)


def kl_divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Mean over rows of KL(reference ‖ logits) = Σ p (log p - log q), in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        logarithms: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return logarithms

    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def model_file(name: str, folder: Path) -> Path:
    """A small model with random weights, or one of the trained haiku models."""
    if name in FILES:
        return export(name, folder)
    write_spec(folder / f"{name}.gguf", TINY[name])
    return folder / f"{name}.gguf"


def prompt_ids(model: refengine.Model, name: str, seed: int) -> list[int]:
    """N_TOKENS ids: conversations for a haiku model, random ids for the others."""
    if name not in FILES:
        ids: list[int] = np.random.default_rng(seed).integers(0, model.config.n_vocab, N_TOKENS).tolist()
        return ids
    text = "".join(Corpus().documents(1_000_000_000 + seed, 4))  # of a seed that training does not reach
    return model.tokenizer.encode(text, add_special=False, parse_special=True)[:N_TOKENS]


def row(name: str, folder: Path, n_prompts: int) -> str:
    path = model_file(name, folder)
    kv_type = "f32" if "-f32" in name else "f16"
    rounded = refengine.load(path, numerics="llamacpp", kv_type=kv_type)
    exact = refengine.load(path, numerics="exact", kv_type="f32")
    figures = []
    for seed in range(n_prompts):
        ids = prompt_ids(exact, name, seed)
        with LlamaCpp(path, kv_type=kv_type) as peer:
            theirs, tensors = peer.tensors(ids)
        _, compared = replay(rounded, ids, tensors)
        oracle = exact.forward(ids)
        own = max(nmse(a, b) for a, b in compared.values())
        end_to_end = nmse(rounded.forward(ids), theirs)
        figures.append((own, end_to_end, nmse(theirs, oracle), max(kl_divergence(theirs, oracle), 0.0)))
    own, end_to_end, rounding, kl = np.median(np.array(figures), axis=0)
    return f"| {name} | {own:.0e} | {end_to_end:.0e} | {rounding:.0e} | {kl:.0e} |"


def kernel_errors(name: str, place: str, folder: Path, n_prompts: int) -> dict[str, list[float]]:
    """The median NMSE and KL divergence from `exact`: of the kernels, and of llama.cpp if it is installed."""
    path = model_file(name, folder)
    exact = refengine.load(path, numerics="exact")
    kernels = refengine.load(path, place, "fast")
    figures: dict[str, list[tuple[float, float]]] = {"kernels": []}
    for seed in range(n_prompts):
        ids = prompt_ids(exact, name, seed)
        oracle = exact.forward(ids)
        ours = kernels.forward(ids)
        figures["kernels"].append((nmse(ours, oracle), max(kl_divergence(ours, oracle), 0.0)))
        if importlib.util.find_spec("llama_cpp") is not None:
            with LlamaCpp(path, kv_type="f16") as peer:
                theirs = peer.logits(ids)
            figures.setdefault("llamacpp", []).append((nmse(theirs, oracle), max(kl_divergence(theirs, oracle), 0.0)))
    return {who: np.median(np.array(found), axis=0).tolist() for who, found in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=5, help=f"prompts of {N_TOKENS} tokens (default 5)")
    parser.add_argument("--kernels", choices=("host", "cuda"), help="compare the kernels with `exact` instead")
    args = parser.parse_args()
    if args.kernels:
        print("| model | kernels from `exact` | KL (nats) | llama.cpp from `exact` | KL (nats) |")
        print("|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            for name in (*MODELS, *FILES):
                found = kernel_errors(name, args.kernels, Path(folder), args.prompts)
                figures = [*found["kernels"], *found.get("llamacpp", [])]
                print(f"| {name} | {' | '.join(f'{x:.0e}' for x in figures)} |", flush=True)
        return
    print("| model | worst op, own inputs | end to end | llama.cpp from `exact` | KL of that (nats) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in (*MODELS, *FILES):
            print(row(name, Path(folder), args.prompts), flush=True)


if __name__ == "__main__":
    main()
