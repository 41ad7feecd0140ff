"""Print the log-probability of each token of an answer, given the question and the tokens before it."""

from __future__ import annotations

import numpy as np

import refengine

model = refengine.load()
question = model.tokenizer.encode_chat([{"role": "user", "content": "Write a haiku about GPU computing"}])
answer = model.tokenizer.encode("fused, delicate threads\nquiet light in the green light\nlight runs for a while")
logits = model.forward(question + answer).astype(np.float64)  # (n_tokens, n_vocab)
before = logits[len(question) - 1 : -1]  # the logits from which each token of the answer would be drawn
top = before.max(axis=-1, keepdims=True)
log_probabilities = before - top - np.log(np.exp(before - top).sum(axis=-1, keepdims=True))
scores = log_probabilities[np.arange(len(answer)), answer]

for token, score in zip(answer, scores, strict=True):
    print(f"{model.tokenizer.decode([token])!r:12} {score:8.3f}")
print(f"perplexity {np.exp(-scores.mean()):.2f}")
