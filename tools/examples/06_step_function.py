"""Run several sequences at once with the engine's step function, and fork one of them."""

from __future__ import annotations

import refengine
from refengine.engine.engine import Engine, EngineOptions

model = refengine.load()
engine = Engine(model, EngineOptions(max_batch=4, cache_tokens=1024))
engine.warm_up()


def chat(text: str) -> list[int]:
    """The ids of a user's message in the model's chat template."""
    return model.tokenizer.encode_chat([{"role": "user", "content": text}])


prompts = ["Write a haiku about the sea", "Write a haiku about the moon"]
running = [
    engine.start(chat(prompt), refengine.SamplingParams(seed=i, temperature=0.7, max_tokens=40))
    for i, prompt in enumerate(prompts)
]
engine.step()  # prompts, and the first token of each
running.append(engine.fork(running[0], refengine.SamplingParams(seed=9, temperature=0.7, max_tokens=40)))
while not engine.idle:
    engine.step()
for generation in running:
    ids = generation.ids[generation.n_prompt :]
    print(f"seed {generation.seed}, ended by {generation.end}:", model.tokenizer.decode(ids).replace("\n", " / "))
    engine.free(generation)
