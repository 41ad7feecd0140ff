"""The vocabulary of a GGUF file: token texts, types, scores and special ids, checked.

`bpe.py` and `spm.py` build tokenizers from a `Vocabulary`.
Every problem in the metadata is an error that names the key and its byte offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguf import TokenType

from refengine.errors import GGUFError, TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer.special import SpecialTokens, find_special_tokens

_PREFIX = "tokenizer.ggml."
# Metadata keys by role; a later key of the same role overrides (llama.cpp's order).
_ROLE_KEYS = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",),
    "pad": ("padding_token_id",),
    "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid": ("fim_mid_token_id", "middle_token_id"),
    "fim_pad": ("fim_pad_token_id",),
    "fim_rep": ("fim_rep_token_id",),
    "fim_sep": ("fim_sep_token_id",),
}


@dataclass(frozen=True)
class Vocabulary:
    """Everything that a tokenizer needs from the file."""

    tokens: list[str]  # token id -> text as stored: byte-level, or with U+2581 for a space
    ids: dict[str, int]  # text -> token id
    types: list[int]  # gguf.TokenType by token id
    roles: dict[str, int]  # "bos", "eos", "unk", ... -> token id
    special: SpecialTokens
    add_bos: bool
    add_eos: bool

    @property
    def size(self) -> int:
        return len(self.tokens)


def read_vocabulary(gguf: GGUFFile, *, default_roles: dict[str, int], add_bos: bool) -> Vocabulary:
    """The vocabulary of `gguf`.

    `default_roles` and `add_bos` are used if the file does not give these values; a default id outside the vocabulary
    is ignored. Raises GGUFError naming the key for an empty vocabulary, duplicate tokens, too few token types, special
    ids out of range, or values of the wrong type; TokenizerError if BOS or EOS is to be added but the file has no id
    for it.
    """
    key = _PREFIX + "tokens"
    texts = gguf.get(key, "strs")
    if not texts:
        raise gguf.error(key, f"{key} is empty: a vocabulary needs at least one token")
    # llama.cpp gives empty tokens these names, so that they differ.
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)] if "" in texts else texts
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        first = next(i for i, text in enumerate(tokens) if ids[text] != i)
        raise gguf.error(key, f"{key}: token {tokens[first]!r} occurs twice, with ids {first} and {ids[tokens[first]]}")
    types = read_types(gguf, len(tokens))
    roles = read_roles(gguf, len(tokens), default_roles)
    special = find_special_tokens(tokens, types, ids.get, roles, gguf.get("general.name", str, default=""))
    vocabulary = Vocabulary(
        tokens=tokens,
        ids=ids,
        types=types,
        roles=roles,
        special=special,
        add_bos=gguf.get(_PREFIX + "add_bos_token", bool, default=add_bos),
        add_eos=gguf.get(_PREFIX + "add_eos_token", bool, default=False),
    )
    for role, is_added in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)):
        if is_added and role not in roles:
            raise TokenizerError(
                f"{gguf.path}: the tokenizer adds {role.upper()}, but {_PREFIX}{role}_token_id is missing;"
                f" set it, or set {_PREFIX}add_{role}_token to false"
            )
    return vocabulary


def read_roles(gguf: GGUFFile, n_tokens: int, default_roles: dict[str, int]) -> dict[str, int]:
    """The special-token id of each role. Raises GGUFError for a `tokenizer.ggml.*_token_id` outside 0..n_tokens-1."""
    for key in gguf.metadata:
        if key.startswith(_PREFIX) and key.endswith("_token_id"):
            token_id = gguf.get(key, int)
            if not 0 <= token_id < n_tokens:
                raise gguf.error(key, f"{key} is {token_id}, outside the vocabulary of {n_tokens} tokens")
    roles = {role: token_id for role, token_id in default_roles.items() if token_id < n_tokens}
    for role, keys in _ROLE_KEYS.items():
        for name in keys:
            if _PREFIX + name in gguf.metadata:
                roles[role] = gguf.get(_PREFIX + name, int)
    return roles


def read_types(gguf: GGUFFile, n_tokens: int) -> list[int]:
    """The gguf.TokenType of each token; all normal if the file has no types. Raises GGUFError for too few types."""
    key = _PREFIX + "token_type"
    if key not in gguf.metadata:
        return [int(TokenType.NORMAL)] * n_tokens
    types: list[int] = gguf.get(key, "ints").tolist()
    _check_length(gguf, key, types, n_tokens)
    return types[:n_tokens]


def read_scores(gguf: GGUFFile, n_tokens: int) -> list[float]:
    """The score of each token; 0.0 if the file has no scores (as in llama.cpp).

    Raises GGUFError for fewer scores than tokens, a score that is NaN, or another element type.
    """
    key = _PREFIX + "scores"
    if key not in gguf.metadata:
        return [0.0] * n_tokens
    # llama.cpp also accepts int32 scores.
    is_int = gguf.type_name(key) == "array of int32"
    scores = [float(score) for score in (gguf.get(key, "ints") if is_int else gguf.get(key, "floats"))]
    _check_length(gguf, key, scores, n_tokens)
    bad = next((i for i, score in enumerate(scores) if math.isnan(score)), None)
    if bad is not None:
        raise gguf.error(key, f"{key}: the score of token {bad} is not a number")
    return scores[:n_tokens]


def read_merges(gguf: GGUFFile) -> list[tuple[str, str]]:
    """The BPE merges by rank, as pairs of token texts; of equal merges the first is used (as in llama.cpp).

    Raises GGUFError if there are none, or if one is not two texts separated by one space.
    """
    key = _PREFIX + "merges"
    if key not in gguf.metadata:
        raise gguf.error(key, f"{key} is missing: a byte-level BPE vocabulary needs its merges")
    merges: list[tuple[str, str]] = []
    for rank, line in enumerate(gguf.get(key, "strs")):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise gguf.error(key, f"{key}: merge {rank} is {line!r}; expected two token texts with one space between")
        merges.append((left, right))
    return list(dict.fromkeys(merges))


def unknown_merge(gguf: GGUFFile, merges: list[tuple[str, str]], ids: dict[str, int]) -> GGUFError | None:
    """The error about the first merge whose parts or result are not tokens, if there is one."""
    key = _PREFIX + "merges"
    for left, right in merges:
        for text in (left, right, left + right):
            if text not in ids:
                return gguf.error(key, f"{key}: merge {left + ' ' + right!r} needs {text!r}, which is not a token")
    return None


def _check_length(gguf: GGUFFile, key: str, values: Sequence[object], n_tokens: int) -> None:
    if len(values) < n_tokens:
        raise gguf.error(key, f"{key} has {len(values)} entries for {n_tokens} tokens")
