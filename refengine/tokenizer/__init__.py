"""Tokenizers: text to token ids and back, as the model file describes it.

`load_tokenizer(gguf)` chooses the tokenizer: a `tokenizer.json` beside the model, else byte-level BPE or SentencePiece
built from the GGUF's own vocabulary. All are subclasses of `Tokenizer`. The libraries that they use are imported only
when a tokenizer is built.
"""

from refengine.tokenizer.base import Tokenizer
from refengine.tokenizer.load import load_tokenizer
from refengine.tokenizer.stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]
