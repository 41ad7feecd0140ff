"""refengine: a readable reference inference engine for GGUF language models.

import refengine
model = refengine.load("model.gguf", device="cpu", numerics="exact")
logits = model.forward(model.tokenizer.encode("Once upon a time"))    # (n_tokens, n_vocab) float32
for token in refengine.generate(model, "Once upon a time"):
    print(token.text, end="", flush=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refengine.api import generate, load
    from refengine.engine.sampling import SamplingParams
    from refengine.errors import RefengineError
    from refengine.model import Model
    from refengine.trace import Trace

__all__ = ["Model", "RefengineError", "SamplingParams", "Trace", "generate", "load"]
__version__ = "0.1.0"

_PLACES = {
    "Model": "refengine.model",
    "RefengineError": "refengine.errors",
    "SamplingParams": "refengine.engine.sampling",
    "Trace": "refengine.trace",
    "generate": "refengine.api",
    "load": "refengine.api",
}


def __getattr__(name: str) -> Any:
    """Import names and modules on first use, so that the command line parses its arguments before slow imports."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if not name.startswith("_"):
        try:
            return import_module(f"refengine.{name}")
        except ModuleNotFoundError as e:
            if e.name != f"refengine.{name}":
                raise
    raise AttributeError(f"module 'refengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, including lazy ones, so that completion and help(refengine) show them."""
    return sorted({*globals(), *__all__})
