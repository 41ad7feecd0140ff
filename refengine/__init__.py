"""refengine: a readable reference inference engine for GGUF language models.

import refengine
model = refengine.load("model.gguf", device="cpu", numerics="exact")
logits = model.forward(model.tokenizer.encode("Once upon a time"))    # (n_tokens, n_vocab) float32
for token in model.generate("Once upon a time"):
    print(token.text, end="", flush=True)
"""

from refengine.engine.sampling import SamplingParams
from refengine.errors import RefengineError
from refengine.model import Model, load
from refengine.trace import Trace

__all__ = ["Model", "RefengineError", "SamplingParams", "Trace", "load"]
__version__ = "0.1.0"
