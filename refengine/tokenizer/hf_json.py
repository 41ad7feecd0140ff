"""The tokenizer of a `tokenizer.json` beside the model, run by the `tokenizers` library, which defines this format.

The library does all encoding, including special tokens. The base class decodes, from the bytes of each token; the
file's decoder only determines how a token spells its bytes. BOS, EOS and special ids come from the GGUF's metadata if
it has them, because the model is run with them.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.normalizers import Replace
from tokenizers.normalizers import Sequence as Normalizers

from refengine.errors import TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer.base import SpacePrefix, Tokenizer
from refengine.tokenizer.byte_level import SPACE, byte_level_to_bytes, sentencepiece_to_bytes
from refengine.tokenizer.pretokenizers import PRE_TOKENIZERS
from refengine.tokenizer.special import find_special_tokens
from refengine.tokenizer.vocab import read_roles, read_types


class HFJsonTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json.

    Raises TokenizerError if the library cannot read the file, if its decoder is neither byte-level nor
    SentencePiece-like, if it has more ids than the model, or if the GGUF has a vocabulary in which an ordinary token
    differs. Ids that only the model has, because its embedding is padded, have no text.
    """

    kind = "hf-json"

    def __init__(self, gguf: GGUFFile, path: Path) -> None:
        try:
            library = LibraryTokenizer.from_file(str(path))
        except Exception as error:  # the library raises no more specific type
            raise TokenizerError(f"{path}: the tokenizers library cannot read it: {error}") from error
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._lock = threading.Lock()  # guards the library object's flag that says whether special tokens are parsed
        self._is_byte_level = _is_byte_level(path, _parts(library.decoder))
        self.space_prefix = _space_prefix(_parts(library.normalizer) + _parts(library.pre_tokenizer))

        in_json = {token_id: text for text, token_id in library.get_vocab(with_added_tokens=True).items()}
        if not in_json:
            raise TokenizerError(f"{path}: the vocabulary is empty")
        in_gguf = gguf.get("tokenizer.ggml.tokens", "strs", default=[])
        n_tokens = len(in_gguf) or max(in_json) + 1
        self.vocab_size = len(in_gguf) or _embedding_rows(gguf) or n_tokens
        if max(in_json) >= self.vocab_size:
            raise TokenizerError(
                f"{path}: has token id {max(in_json)}, but {gguf.path.name} has only {self.vocab_size} tokens; "
                f"{_advice(path)}"
            )
        types = read_types(gguf, n_tokens)
        if in_gguf:
            _check_same_vocabulary(gguf, path, in_gguf, types, in_json)
        else:
            types = [kind if i in in_json else int(TokenType.UNUSED) for i, kind in enumerate(types)]
        for token_id, added in library.get_added_tokens_decoder().items():
            types[token_id] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        self._types = types
        self._tokens = [in_json.get(i) or (in_gguf[i] if in_gguf else _no_token(i)) for i in range(n_tokens)]

        bos_ids, eos_ids = _added_around(library)
        in_post_processor = {"bos": bos_ids[0]} if bos_ids else {}
        in_post_processor |= {"eos": eos_ids[-1]} if eos_ids else {}
        self._roles = read_roles(gguf, n_tokens, in_post_processor)
        ids = {text: i for i, text in enumerate(self._tokens)}
        name = gguf.get("general.name", str, default="")
        self._special = find_special_tokens(self._tokens, types, ids.get, self._roles, name)
        self.bos_id = self._roles.get("bos")
        self.eos_id = self._roles.get("eos")
        self.eog_ids = self._special.eog_ids
        add_bos, add_eos = _added_by_default(gguf, bool(bos_ids), bool(eos_ids))
        self.add_bos = gguf.get("tokenizer.ggml.add_bos_token", bool, default=add_bos) and self.bos_id is not None
        self.add_eos = gguf.get("tokenizer.ggml.add_eos_token", bool, default=add_eos) and self.eos_id is not None
        self.chat_template = gguf.get("tokenizer.chat_template", str, default=None)

    def token_text(self, token_id: int) -> str:
        self._check_id(token_id)
        return self._tokens[token_id] if token_id < len(self._tokens) else _no_token(token_id)

    def _encode(self, text: str, parse_special: bool, mark: str = "") -> list[int]:
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            if mark and mark in text:
                return self._encode_marked(text, mark)
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode text with marks. The library finds special tokens first; a normalizer then removes the marks."""
        library, normalizer = self._library, self._library.normalizer
        added = library.get_added_tokens_decoder()
        late = [t.text for t in self._special.cuts if t.is_control and t.id in added and added[t.id].normalized]
        if late:
            raise TokenizerError(
                f"{late[0]!r} in a message: this tokenizer.json cannot distinguish it from the template's token"
            )
        drop = Replace(mark, "")
        library.normalizer = drop if normalizer is None else Normalizers([drop, normalizer])
        try:
            ids: list[int] = library.encode(text, add_special_tokens=False).ids
        finally:
            library.normalizer = normalizer
        return ids

    def _encode_text(self, text: str) -> list[int]:
        return self._encode(text, parse_special=False)

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id >= len(self._tokens):  # a padding row of the embedding
            return b""
        text = self._tokens[token_id]
        if token_id in self._special.cut_ids:
            return text.encode()
        if self._types[token_id] not in (TokenType.NORMAL, TokenType.BYTE):
            return b""
        return byte_level_to_bytes(text) if self._is_byte_level else sentencepiece_to_bytes(text)


def _parts(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer, pre-tokenizer or decoder; for a sequence, those of each of its parts."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in settings:
            return list(settings[name])
    return [settings]


def _is_byte_level(path: Path, decoders: list[dict[str, Any]]) -> bool:
    kinds = {part["type"] for part in decoders}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return False
    raise TokenizerError(
        f"{path}: its decoder is {', '.join(sorted(kinds)) or 'missing'}; expected ByteLevel, Metaspace or ByteFallback"
    )


def _space_prefix(parts: list[dict[str, Any]]) -> SpacePrefix:
    """Where a SentencePiece-like tokenizer.json adds a space."""
    for part in parts:
        if part["type"] == "Prepend" and part.get("prepend") == SPACE:
            return "fragments"
        if part["type"] == "Metaspace":
            schemes: dict[str, SpacePrefix] = {"always": "fragments", "first": "start"}
            return schemes.get(part.get("prepend_scheme", "always"), "none")
    return "none"


def _added_around(library: LibraryTokenizer) -> tuple[list[int], list[int]]:
    """The ids that the file's post-processor adds before and after a text."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _added_by_default(gguf: GGUFFile, has_bos: bool, has_eos: bool) -> tuple[bool, bool]:
    """Whether BOS and EOS are added if the metadata do not say: the defaults of the GGUF's vocabulary, if it has one.

    `has_bos`, `has_eos`: whether the tokenizer.json's post-processor adds them.
    """
    model = gguf.get("tokenizer.ggml.model", str, default="")
    if model == "llama":
        return True, False
    if model == "gpt2":
        pre_tokenizer = PRE_TOKENIZERS.get(gguf.get("tokenizer.ggml.pre", str, default=""))
        return pre_tokenizer is not None and pre_tokenizer.add_bos, False
    return has_bos, has_eos


def _embedding_rows(gguf: GGUFFile) -> int:
    """The number of rows of the embedding; 0 in a file without weights."""
    embedding = gguf.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None else 0


def _no_token(token_id: int) -> str:
    return f"[EMPTY_{token_id}]"


def _advice(path: Path) -> str:
    return f"remove {path.name} if it belongs to another model"


def _check_same_vocabulary(
    gguf: GGUFFile, path: Path, in_gguf: list[str], types: list[int], in_json: dict[int, str]
) -> None:
    """Raise TokenizerError if an ordinary token differs. GGUF files may have padding and other special tokens."""
    for token_id, (text, kind) in enumerate(zip(in_gguf, types, strict=False)):
        if kind in (TokenType.NORMAL, TokenType.BYTE) and in_json.get(token_id, text) != text:
            raise TokenizerError(
                f"{path}: token {token_id} is {in_json[token_id]!r}, but {text!r} in {gguf.path.name}; {_advice(path)}"
            )
