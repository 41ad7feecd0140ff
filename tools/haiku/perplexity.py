"""Perplexity of the haiku models on poems that training never saw, here and in llama.cpp, side by side.

    python -m tools.haiku.perplexity FOLDER      # the files that tools/haiku/export.py wrote there

Over the tokens of the poem and its end, given the request: exp of the mean negative log-likelihood. Requests and
templates are those held out of training; the last column has new poems of templates that were not, under `exact`.
llama.cpp runs on the CPU with the weights as the file has them, and the KV cache each profile has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import refengine
from refengine.errors import RefengineError
from refengine.tokenizer.base import Tokenizer
from refengine.validate.llamacpp import LlamaCpp
from tools.haiku.corpus import IM_END, Corpus, Request, chat
from tools.haiku.export import FILES
from tools.haiku.grammar import Haiku

POEMS = 200


def encoded(tokenizer: Tokenizer, pairs: Sequence[tuple[Request, Haiku]]) -> list[tuple[list[int], int]]:
    """Ids of whole chats, and how many of them are the request."""
    result = []
    for request, haiku in pairs:
        prompt = tokenizer.encode(chat(request.prompt), add_special=False, parse_special=True)
        poem = tokenizer.encode(haiku.text + IM_END, add_special=False, parse_special=True)
        result.append((prompt + poem, len(prompt)))
    return result


def perplexity(logits_of: Callable[[list[int]], np.ndarray], chats: Sequence[tuple[list[int], int]]) -> float:
    """exp(mean of -log p) over the tokens after the request; natural logarithm, in float64."""
    losses = []
    for ids, n_prompt in chats:
        rows = logits_of(ids)[n_prompt - 1 : -1].astype(np.float64)  # (n_poem, n_vocab)
        shifted = rows - rows.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(axis=1))
        losses.append(log_sum - shifted[np.arange(len(rows)), ids[n_prompt:]])
    return float(np.exp(np.concatenate(losses).mean()))


def row(path: Path, corpus: Corpus, n_poems: int) -> str:
    """One line of the table."""
    exact, rounded = (refengine.load(path, numerics=profile) for profile in ("exact", "llamacpp"))
    unseen, seen = (encoded(exact.tokenizer, corpus.unseen(2, n_poems, unseen)) for unseen in (True, False))
    figures = [perplexity(exact.forward, unseen), perplexity(rounded.forward, unseen)]
    with LlamaCpp(path, capture=False) as peer:

        def theirs(ids: list[int]) -> np.ndarray:
            peer.reset()
            return peer.logits(ids)

        figures.append(perplexity(theirs, unseen))
    figures.append(perplexity(exact.forward, seen))
    cells = " | ".join(f"{value:.4f}" for value in figures)
    return f"| {path.stem} | {path.stat().st_size / 1e6:.2f} MB | {cells} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="perplexity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with the files of tools/haiku/export.py")
    parser.add_argument("--poems", type=int, default=POEMS, help=f"default {POEMS}")
    args = parser.parse_args(argv)
    paths = [args.folder / f"{name}.gguf" for name in FILES if (args.folder / f"{name}.gguf").exists()]
    if not paths:
        print(f"perplexity: {args.folder} has none of {', '.join(FILES)}; run tools.haiku.export", file=sys.stderr)
        return 2
    corpus = Corpus()
    print("| file | size | `exact` | `llamacpp` | llama.cpp | trained templates, `exact` |\n|---|---|---|---|---|---|")
    try:
        for path in tqdm(paths, file=sys.stderr, disable=None):
            print(row(path, corpus, args.poems), flush=True)
    except RefengineError as e:
        print(f"perplexity: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
