"""SentencePiece tokenizer built from a GGUF file's tokens, scores and types, on the `sentencepiece` library.

The library merges (BPE by score) and falls back to bytes; the base class handles special tokens, BOS and EOS.
The space that SentencePiece adds before a text is added before every fragment between special tokens, as in llama.cpp
(`tokenizer.ggml.add_space_prefix`); decoding removes it at the same places.

Unlike in llama.cpp, ordinary text is never merged into a control token.
"""

from __future__ import annotations

from gguf import TokenType
from sentencepiece import SentencePieceProcessor

from refengine.errors import TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer.base import Tokenizer
from refengine.tokenizer.byte_level import BYTE_FALLBACK, sentencepiece_to_bytes
from refengine.tokenizer.spm_proto import build_model_proto
from refengine.tokenizer.vocab import Vocabulary, read_scores, read_vocabulary


class SentencePieceBPE(Tokenizer):
    """The tokenizer for `tokenizer.ggml.model` = "llama".

    Raises the errors of `read_vocabulary` and `read_scores`, and GGUFError for a token of type byte whose text is not
    `<0xNN>`. A vocabulary without all 256 byte tokens encodes unknown characters as the unknown token.
    """

    kind = "gguf-spm"

    def __init__(self, gguf: GGUFFile) -> None:
        vocabulary = read_vocabulary(gguf, default_roles={"bos": 1, "eos": 2, "unk": 0}, add_bos=True)
        scores = read_scores(gguf, vocabulary.size)
        has_all_bytes = all(text in vocabulary.ids for text in BYTE_FALLBACK)
        unk_id = _unknown_id(vocabulary)
        try:
            proto = build_model_proto(
                vocabulary.tokens,
                scores,
                _piece_types(gguf, vocabulary, unk_id, has_all_bytes),
                unk_id=unk_id,
                byte_fallback=has_all_bytes,
            )
            self._library = SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, ValueError) as error:
            raise TokenizerError(f"{gguf.path}: the SentencePiece vocabulary cannot be built: {error}") from error
        # Also in a file without token types, where they are ordinary tokens.
        self._byte_tokens = BYTE_FALLBACK if has_all_bytes else {}
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        self._special = vocabulary.special
        self._roles = vocabulary.roles
        self._has_prefix = gguf.get("tokenizer.ggml.add_space_prefix", bool, default=True)
        self.space_prefix = "fragments" if self._has_prefix else "none"
        self.vocab_size = vocabulary.size
        self.bos_id = vocabulary.roles.get("bos")
        self.eos_id = vocabulary.roles.get("eos")
        self.eog_ids = vocabulary.special.eog_ids
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.chat_template = gguf.get("tokenizer.chat_template", str, default=None)

    def token_text(self, token_id: int) -> str:
        self._check_id(token_id)
        return self._tokens[token_id]

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(" " + text if self._has_prefix else text, out_type=int)
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        text = self._tokens[token_id]
        kind = self._types[token_id]
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN) or token_id in self._special.cut_ids:
            return text.encode()
        if kind == TokenType.NORMAL or text in self._byte_tokens:
            return sentencepiece_to_bytes(text, self._byte_tokens)
        return b""  # an unused token has no bytes, as in llama.cpp


def _unknown_id(vocabulary: Vocabulary) -> int:
    """The id of the one unknown token that SentencePiece requires; files have none, one, or, as padding, many."""
    typed = (i for i, kind in enumerate(vocabulary.types) if kind == TokenType.UNKNOWN)
    return vocabulary.roles["unk"] if "unk" in vocabulary.roles else next(typed, 0)


def _piece_types(gguf: GGUFFile, vocabulary: Vocabulary, unk_id: int, has_all_bytes: bool) -> list[int]:
    """The types for the library. Tokens that the base class splits text at must not occur in the library's results."""
    types = list(vocabulary.types)
    for token_id, kind in enumerate(vocabulary.types):
        text = vocabulary.tokens[token_id]
        if kind == TokenType.BYTE and text not in BYTE_FALLBACK:
            key = "tokenizer.ggml.token_type"
            raise gguf.error(
                key, f"{key}: token {token_id} is a byte, but its text is {text!r}; expected <0x00>..<0xFF>"
            )
        if text in BYTE_FALLBACK:
            types[token_id] = int(TokenType.BYTE if has_all_bytes else TokenType.CONTROL)
        elif token_id == unk_id:
            types[token_id] = int(TokenType.UNKNOWN)
        elif kind == TokenType.UNKNOWN:
            types[token_id] = int(TokenType.CONTROL)
        elif kind == TokenType.USER_DEFINED:
            is_control = token_id in vocabulary.special.hidden_ids
            types[token_id] = int(TokenType.CONTROL if is_control else TokenType.NORMAL)
        elif kind not in (TokenType.NORMAL, TokenType.CONTROL, TokenType.UNUSED):
            types[token_id] = int(TokenType.UNUSED)  # undefined
    return types
