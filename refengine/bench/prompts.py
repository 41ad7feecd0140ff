"""Makes prompts of a given number of tokens, using the worker's own tokenizer."""

from __future__ import annotations

import random

from refengine.client.client import Client

WORDS = [
    *("the", "sea", "a", "light", "over", "warm", "stones", "small", "boats", "drift", "where", "old", "wind", "salt"),
    *("into", "every", "room", "of", "this", "quiet", "house", "while", "rain", "begins", "on", "roofs", "remember"),
    *("summer", "days", "long", "gone", "by", "now", "we", "wait", "for", "morning", "with", "open", "windows", "as"),
    *("bells", "answer", "each", "other", "across", "dark", "water", "and", "fields", "grey", "grass"),
]
TOPICS = ("the ocean", "GPU computing", "winter rain", "a garden", "the moon", "old books", "autumn", "mountains")
TRIES = 30


def prompt_of(client: Client, n_tokens: int, variant: int) -> tuple[str, int]:
    """A text of `n_tokens` tokens, and its actual number of tokens. Each variant has another first word and order.

    If the vocabulary does not allow the exact number, the text has fewer tokens, as near as possible.
    """
    draw = random.Random(f"{n_tokens}/{variant}")
    words = [f"{variant}"]
    ids: list[int] = []
    while len(ids) < n_tokens + 8:
        words += draw.choices(WORDS, k=n_tokens)
        ids = client.tokenize(" ".join(words), add_special=False)
    keep, best = n_tokens, ("", 0)
    for _ in range(TRIES):
        text = client.detokenize(ids[:keep])
        found = len(client.tokenize(text))
        if best[1] < found <= n_tokens:
            best = text, found
        if found == n_tokens:
            break
        keep = max(1, min(len(ids), keep + n_tokens - found if found > n_tokens else keep + 1))
    return best


def topics() -> list[str]:
    return [f"Write a haiku about {topic}" for topic in TOPICS]
