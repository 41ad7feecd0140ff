"""Chooses and loads the tokenizer of a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from refengine.errors import RequestError, TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer.base import Tokenizer

_NO_VOCABULARY = ("no_vocab", "none")
_MODELS = ("gpt2", "llama")


def load_tokenizer(gguf: GGUFFile, source: Literal["auto", "gguf", "hf-json"] = "auto") -> Tokenizer | None:
    """The tokenizer of a model, or None if there is none; the model then works with token ids only.

    `source`: "gguf" builds it from the file's own vocabulary; "hf-json" reads `NAME.tokenizer.json` (for a model
    NAME.gguf) or `tokenizer.json` in the model's folder; "auto" uses such a file if there is one, else the GGUF.
    Raises TokenizerError for a vocabulary of an unsupported kind, a tokenizer.json that does not belong to the model,
    or a requested one that does not exist; GGUFError for malformed metadata; RequestError for another `source`.
    """
    if source not in ("auto", "gguf", "hf-json"):
        raise RequestError(f"unknown tokenizer source {source!r}; choose auto, gguf or hf-json")
    json_path = find_tokenizer_json(gguf.path)
    if source == "hf-json" and json_path is None:
        raise TokenizerError(f"{gguf.path}: there is no tokenizer.json in its folder")
    # Imported here, so that the slow libraries are only loaded if they are needed.
    if source != "gguf" and json_path is not None:
        from refengine.tokenizer.hf_json import HFJsonTokenizer

        return HFJsonTokenizer(gguf, json_path)
    model = tokenizer_model(gguf)
    if model is None:
        return None
    if model == "gpt2":
        from refengine.tokenizer.bpe import ByteLevelBPE

        return ByteLevelBPE(gguf)
    from refengine.tokenizer.spm import SentencePieceBPE

    return SentencePieceBPE(gguf)


def tokenizer_model(gguf: GGUFFile) -> str | None:
    """`tokenizer.ggml.model`, or None for a file without a vocabulary. Raises TokenizerError if it is not supported."""
    key = "tokenizer.ggml.model"
    if key not in gguf.metadata and "tokenizer.ggml.tokens" in gguf.metadata:
        raise gguf.error(key, f"{key} is missing, although the file has tokens; expected one of {', '.join(_MODELS)}")
    model = gguf.get(key, str, default="none")
    if model in _NO_VOCABULARY:
        return None
    if model not in _MODELS:
        raise TokenizerError(
            f"{gguf.path}: {key} is {model!r}, which is not supported; supported: {', '.join(_MODELS)}"
        )
    return model


def find_tokenizer_json(model_path: Path) -> Path | None:
    """The tokenizer.json beside a model file, or None; one with the model's name is preferred."""
    candidates = (model_path.with_name(f"{model_path.stem}.tokenizer.json"), model_path.with_name("tokenizer.json"))
    return next((path for path in candidates if path.is_file()), None)
