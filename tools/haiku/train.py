"""Train a haiku model with PyTorch (`pip install -e '.[haiku]'`), on a GPU if there is one.

    python -m tools.haiku.train dense   --output runs/dense
    python -m tools.haiku.train experts --output runs/experts --steps 1800
    python -m tools.haiku.export FOLDER --keep runs/dense dense --keep runs/experts experts

made the kept checkpoints. The corpus is made anew from its seed, the same on every machine. Written to --output:
`state.pt` every few hundred steps (--resume goes on from it), `log.csv` and `loss.png` (the loss curve), and at the end
`model.safetensors`, float16 under GGUF names. On a GPU two runs differ in rounding.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from tools.haiku.corpus import SHARD, TRAINING_DOCUMENTS, TRAINING_SEED, Corpus, chat, shard_seed
from tools.haiku.export import CHECKPOINT
from tools.haiku.network import BALANCE, HaikuModel
from tools.haiku.specs import SPECS

ROWS = (80, 512)  # tokens of a training row, by turns: most chats are shorter than the first
VALIDATION = 512  # held-out requests and templates
LOG_EVERY, SAVE_EVERY = 100, 500


@dataclass(frozen=True)
class TrainingSet:
    """All documents as one run of token ids, and where each begins."""

    ids: np.ndarray  # (n_tokens,) uint16
    starts: np.ndarray  # (n_documents,) int64

    def rows(self, step: int, n_tokens: int, n: int, seed: int) -> np.ndarray:
        """(n_tokens // n, n) ids for a step: rows of n tokens from the beginnings of documents drawn at random."""
        starts = self.starts[: np.searchsorted(self.starts, len(self.ids) - n, side="right")]
        drawn = np.random.default_rng((seed, step)).integers(len(starts), size=n_tokens // n)
        return self.ids[starts[drawn][:, None] + np.arange(n)].astype(np.int64)


def _encoded_shard(tokenizer: Path, seed: int, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of `count` documents, end to end, and the length of each."""
    encoder = Tokenizer.from_file(str(tokenizer))
    documents = list(Corpus().documents(shard_seed(seed, number), count))
    encoded = [e.ids for e in encoder.encode_batch(documents)]
    return np.concatenate([np.array(ids, np.uint16) for ids in encoded]), np.array([len(ids) for ids in encoded])


def training_set(tokenizer: Path, seed: int, n_documents: int) -> TrainingSet:
    """Make and encode the training documents, on all cores; the result does not depend on how many there are."""
    counts = [min(SHARD, n_documents - i) for i in range(0, n_documents, SHARD)]
    n = len(counts)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    with ProcessPoolExecutor() as pool:
        made = pool.map(_encoded_shard, [tokenizer] * n, [seed] * n, range(n), counts)
        shards = list(tqdm(made, total=n, desc="corpus", unit="shard", file=sys.stderr))
    lengths = np.concatenate([s[1] for s in shards])
    return TrainingSet(np.concatenate([s[0] for s in shards]), np.cumsum(lengths) - lengths)


def validation_set(tokenizer: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out chats (VALIDATION, n) and which of their tokens belong to a poem or end it."""
    encoder = Tokenizer.from_file(str(tokenizer))
    pairs = Corpus().unseen(seed=1, count=VALIDATION)
    prompts = [encoder.encode(chat(r.prompt)).ids for r, _ in pairs]
    whole = [encoder.encode(chat(r.prompt) + h.text + "<|im_end|>").ids for r, h in pairs]
    n = max(map(len, whole))
    ids, counted = np.zeros((len(whole), n), np.int64), np.zeros((len(whole), n), bool)
    for i, (prompt, chat_ids) in enumerate(zip(prompts, whole, strict=True)):
        ids[i, : len(chat_ids)] = chat_ids
        counted[i, len(prompt) : len(chat_ids)] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(counted).to(device)


@torch.no_grad()
def validation_loss(model: HaikuModel, ids: torch.Tensor, counted: torch.Tensor) -> float:
    """Mean negative log-likelihood (nats a token) of the poems given their requests."""
    logits, _ = model(ids[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return float(losses[counted[:, 1:].flatten()].mean())


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over the first fiftieth, then a cosine down to a fiftieth of the peak."""
    warm_up: int = max(1, args.steps // 50)
    peak: float = args.lr
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, args.steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_float32_matmul_precision("high")
    args.output.mkdir(parents=True, exist_ok=True)
    model = HaikuModel(SPECS[args.model], args.seed).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip
    state_path, log_path = args.output / "state.pt", args.output / "log.csv"
    first = 0
    if args.resume:
        if not state_path.exists():
            sys.exit(f"train: --resume finds no {state_path}")
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    elif log_path.exists() and not args.overwrite:
        sys.exit(f"train: {args.output} holds another run; give --resume or --overwrite")
    data = training_set(args.tokenizer, args.seed, args.documents)
    held_out = validation_set(args.tokenizer, device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.model}: {n_parameters:,} parameters on {device}; {len(data.starts):,} documents, {len(data.ids):,} "
        f"tokens; {args.steps} steps of {args.batch} tokens = {args.steps * args.batch / len(data.ids):.1f} epochs",
        file=sys.stderr,
    )
    log = _open_log(log_path, first)
    started = time.monotonic()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", file=sys.stderr, mininterval=5)
    for step in bar:
        rows = torch.from_numpy(data.rows(step, args.batch, ROWS[step % len(ROWS)], args.seed)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, balance = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == args.steps:
            training, validation = loss.item(), validation_loss(model, *held_out)
            seconds = time.monotonic() - started
            _write_row(log, [step + 1, f"{training:.4f}", f"{validation:.4f}", f"{seconds:.1f}"])
            bar.set_postfix_str(f"loss {training:.3f}, held-out poems {validation:.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            _save(state_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    log.close()
    rounded = {name: p.to(torch.float16).contiguous() for name, p in model.state().items()}
    save_file(rounded, str(args.output / "model.safetensors"), {"model": args.model})
    plot(log_path, args.output / "loss.png")


def _open_log(path: Path, first: int) -> TextIO:
    """The log with its rows up to step `first`, open for more; every row is on disk as soon as it is written."""
    kept = list(csv.reader(path.open()))[1:] if first else []
    file = path.open("w", buffering=1)
    _write_row(file, ["step", "loss", "held_out_poem_loss", "seconds"])
    for row in kept:
        if int(row[0]) <= first:
            _write_row(file, row)
    return file


def _write_row(file: TextIO, row: list[Any]) -> None:
    csv.writer(file, lineterminator="\n").writerow(row)


def _save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def plot(log: Path, picture: Path) -> None:
    """The loss curve of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [[float(v) for v in row] for row in list(csv.reader(log.open()))[1:]]
    steps, loss, held_out = ([row[i] for row in rows] for i in range(3))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, loss, label="training, all tokens", linewidth=0.8)
    axes.plot(steps, held_out, label="held-out poems, given the request")
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", ylim=(0, max(held_out[: len(held_out) // 20 + 1])))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=tuple(SPECS))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from FOLDER/state.pt")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT / "tokenizer.json")
    parser.add_argument(
        "--documents", type=int, default=TRAINING_DOCUMENTS, help=f"to train on (default {TRAINING_DOCUMENTS:,})"
    )
    parser.add_argument("--steps", type=int, default=1500, help="default 1500")
    parser.add_argument("--batch", type=int, default=65_536, metavar="TOKENS", help="tokens a step (default 65,536)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--seed", type=int, default=TRAINING_SEED, help="default 0")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    train(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
