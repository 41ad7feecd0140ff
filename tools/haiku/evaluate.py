"""How well a haiku model answers requests it was not trained on.

    python -m tools.haiku.evaluate                              # the packaged model
    python -m tools.haiku.evaluate --model F.gguf --json out.json

Each request (a form of asking with a topic's name, held out of training) is answered once, with its own seed. Reported:
answers of three lines; answers that scan 5-7-5 by the lexicon; answers that name a noun of their topic (and, for
comparison, of a topic drawn at random); lines that occur in the training set, against lines of fresh poems from the
grammar, which repeat it too. Making the training set's lines anew takes a little while.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refengine
from refengine.errors import RefengineError
from tools.haiku.corpus import (
    SHARD,
    SPECIALS,
    TRAINING_DOCUMENTS,
    TRAINING_SEED,
    Corpus,
    Request,
    chat,
    shard_seed,
)

FRESH_POEMS = 20  # a request, to see how much the corpus repeats itself
MAX_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """A request and what the model wrote; and what that is worth."""

    request: Request
    seed: int
    text: str
    three_lines: bool
    scans: bool
    on_topic: bool
    on_other_topic: bool


def ask(model: Any, prompt: str, temperature: float, seed: int) -> str:
    """The model's answer to a user's message, at most MAX_TOKENS tokens."""
    ids = model.tokenizer.encode(chat(prompt), add_special=False, parse_special=True)
    params = refengine.SamplingParams(temperature=temperature, seed=seed, max_tokens=MAX_TOKENS)
    return "".join(token.text for token in refengine.generate(model, ids, params))


def answers(model: Any, corpus: Corpus, count: int, temperature: float, first_seed: int = 0) -> Iterable[Answer]:
    """Answers to `count` held-out requests, spread evenly over the topics."""
    rng = random.Random(first_seed)
    by_topic: dict[str, list[Request]] = {}
    for request in corpus.held_out_requests:
        by_topic.setdefault(request.topic, []).append(request)
    keys = [key for key in corpus.topics if key in by_topic]
    lexicon = corpus.grammar.lexicon
    for i in range(count):
        mine = by_topic[keys[i % len(keys)]]
        request = mine[int(rng.random() * len(mine))]
        other = [key for key in corpus.topics if key != request.topic][int(rng.random() * (len(corpus.topics) - 1))]
        text = ask(model, request.prompt, temperature, first_seed + i)
        lines = text.split("\n")
        yield Answer(
            request, first_seed + i, text,
            three_lines=len(lines) == 3 and all(lines),
            scans=lexicon.scans(lines),
            on_topic=lexicon.touches(corpus.topics[request.topic], text),
            on_other_topic=lexicon.touches(corpus.topics[other], text),
        )  # fmt: skip


def _line_hashes(seed: int, number: int, count: int) -> np.ndarray:
    return np.unique(hashes(pieces(Corpus().documents(shard_seed(seed, number), count))))


def pieces(documents: Iterable[str]) -> Iterable[str]:
    """All lines of the documents, and all poems: whatever three lines follow one another."""
    for document in documents:
        lines = _bare(document).split("\n")
        yield from lines
        yield from ("\n".join(lines[i : i + 3]) for i in range(len(lines) - 2))


def _bare(text: str) -> str:
    for special in SPECIALS:
        text = text.replace(special, "")
    return text


def hashes(lines: Iterable[str]) -> np.ndarray:
    """64-bit hashes of lines, the same in every process."""
    digests = (hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def training_pieces(n_documents: int) -> np.ndarray:
    """Hashes of all lines and poems of the training set, sorted."""
    counts = [min(SHARD, n_documents - i) for i in range(0, n_documents, SHARD)]
    n = len(counts)
    with ProcessPoolExecutor() as pool:
        made = pool.map(_line_hashes, [TRAINING_SEED] * n, range(n), counts)
        return np.unique(np.concatenate(list(tqdm(made, total=n, desc="training set", unit="shard", file=sys.stderr))))


def seen_share(texts: list[str], known: np.ndarray) -> float:
    """How many of these lines or poems the training set has."""
    return float(np.isin(hashes(texts), known).mean())


def report(found: list[Answer], corpus: Corpus, n_documents: int) -> dict[str, Any]:
    """The figures, as shares of 1."""
    known = training_pieces(n_documents)
    rng = random.Random(12345)
    written = [line for answer in found for line in answer.text.split("\n")]
    fresh = [
        line for answer in found for _ in range(FRESH_POEMS) for line in corpus.poem(answer.request.topic, rng).lines
    ]
    share = {
        name: sum(getattr(a, name) for a in found) / len(found)
        for name in ("three_lines", "scans", "on_topic", "on_other_topic")
    }
    seen, expected = seen_share(written, known), seen_share(fresh, known)
    return {
        "answers": len(found),
        "topics": len({a.request.topic for a in found}),
        **share,
        "lines_in_training_set": seen,
        "lines_of_fresh_poems_in_training_set": expected,
        "excess": seen - expected,
        "whole_answers_in_training_set": seen_share([a.text for a in found], known),
        "different_answers": len({a.text for a in found}),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FILE.gguf", help="default: the packaged model")
    parser.add_argument("--count", type=int, default=200, help="requests (default 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="default 0.7")
    parser.add_argument("--seed", type=int, default=0, help="of the first request; the others count up (default 0)")
    parser.add_argument("--numerics", default="exact", choices=("exact", "exact64", "llamacpp"))
    parser.add_argument(
        "--documents", type=int, default=TRAINING_DOCUMENTS, help=f"it was trained on (default {TRAINING_DOCUMENTS:,})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and all answers there")
    args = parser.parse_args(argv)
    try:
        model = refengine.load(args.model, numerics=args.numerics)
    except RefengineError as e:
        print(f"evaluate: {e}", file=sys.stderr)
        return 2
    corpus = Corpus()
    asked = answers(model, corpus, args.count, args.temperature, args.seed)
    found = list(tqdm(asked, total=args.count, desc="answers", file=sys.stderr))
    figures = report(found, corpus, args.documents)
    for name, value in figures.items():
        print(f"{name:40} {value:.1%}" if isinstance(value, float) else f"{name:40} {value}")
    failed = [a for a in found if not (a.scans and a.on_topic)]
    for answer in failed[:10]:
        why = ", ".join(w for w, ok in (("does not scan", answer.scans), ("off topic", answer.on_topic)) if not ok)
        print(f"\n{answer.request.prompt!r}, seed {answer.seed}: {why}\n{answer.text}")
    if args.json:
        settings = {"temperature": args.temperature, "seed": args.seed, "numerics": args.numerics}
        document = {"model": model.config.name, **settings, "figures": figures, "answers": [asdict(a) for a in found]}
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
