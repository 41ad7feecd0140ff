"""Byte-level BPE built from a GGUF file's tokens and merges, on the `tokenizers` library.

The library splits fragments into words (`pretokenizers.py`) and merges; the base class handles special tokens, BOS and
EOS. llama.cpp's `clean_spaces`, which drops spaces before punctuation when a whole text is detokenized, is not
applied: decoding returns exactly the encoded text, streamed or not.
"""

from __future__ import annotations

import logging

from gguf import TokenType
from tokenizers import Regex
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from refengine.errors import TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer.base import Tokenizer
from refengine.tokenizer.byte_level import BYTE_TO_CHAR, byte_level_to_bytes
from refengine.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from refengine.tokenizer.vocab import read_merges, read_vocabulary, unknown_merge

_TEXT_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)

log = logging.getLogger(__name__)


class ByteLevelBPE(Tokenizer):
    """The tokenizer for `tokenizer.ggml.model` = "gpt2".

    Raises the errors of `read_vocabulary` and `read_merges`, and TokenizerError for an unknown pre-tokenizer.
    A BOS or EOS id that the file does not give is None (llama.cpp assumes 11, a comma in GPT-2's vocabulary).
    """

    kind = "gguf-bpe"
    space_prefix = "none"

    def __init__(self, gguf: GGUFFile) -> None:
        pre_tokenizer = _pre_tokenizer(gguf)
        vocabulary = read_vocabulary(gguf, default_roles={}, add_bos=pre_tokenizer.add_bos)
        merges = read_merges(gguf)
        try:
            model = BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
        except Exception as error:  # the library raises no more specific type
            raise unknown_merge(gguf, merges, vocabulary.ids) or TokenizerError(
                f"{gguf.path}: the BPE vocabulary cannot be built: {error}"
            ) from error
        self._library = LibraryTokenizer(model)
        self._library.pre_tokenizer = PreTokenizerSequence(
            [Split(Regex(step), "isolated") for step in pre_tokenizer.steps]
            + [ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        self._bytes_without_token = frozenset(b for b, char in BYTE_TO_CHAR.items() if char not in vocabulary.ids)
        self._special = vocabulary.special
        self._roles = vocabulary.roles
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
        # The library would silently drop such a byte. Real vocabularies have all bytes that occur in UTF-8.
        if self._bytes_without_token:
            lost = self._bytes_without_token.intersection(text.encode())
            if lost:
                raise TokenizerError(f"the vocabulary has no token for byte 0x{min(lost):02X} of the text")
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        text = self._tokens[token_id]
        kind = self._types[token_id]
        if kind in _TEXT_TYPES or token_id in self._special.cut_ids:
            return text.encode()
        if kind == TokenType.NORMAL:
            return byte_level_to_bytes(text)
        return b""  # an unused token has no bytes, as in llama.cpp


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    key = "tokenizer.ggml.pre"
    name = gguf.get(key, str, default="")
    if name == "":
        log.warning("%s: %s is missing, so the 'default' pre-tokenizer is used; quality may suffer", gguf.path, key)
        return PRE_TOKENIZERS["default"]
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{gguf.path}: {key} is {name!r}, which is not supported; supported: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]
