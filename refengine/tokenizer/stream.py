"""Decodes token ids to text one at a time, without splitting code points.

A token may end in the middle of a UTF-8 sequence (byte-level BPE, byte fallback). The decoder holds such bytes back
until the sequence is complete or turns out to be invalid.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence
from typing import Protocol


class TokenPieces(Protocol):
    """The part of the interface `Tokenizer` that decoding needs; see there."""

    @property
    def space_prefix(self) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def begins_fragment(self, token_id: int) -> bool: ...
    def is_hidden(self, token_id: int) -> bool: ...


class StreamDecoder:
    """The decoder of one text: `push` every id, then `finish`.

    The results of all pushes and the finish together are what `Tokenizer.decode` returns for the same ids.

    `prompt_ids`: the ids before the text. They are not decoded; but if the text continues a prompt that does not end in
    a special token, a leading space belongs to the text and is kept.
    """

    def __init__(self, tokenizer: TokenPieces, *, skip_special: bool = False, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # The encoder of a SentencePiece vocabulary adds a space before the text and after every special token.
        self._space_expected = tokenizer.space_prefix != "none" and (
            len(prompt_ids) == 0 or tokenizer.begins_fragment(prompt_ids[-1])
        )

    def copy(self) -> StreamDecoder:
        """A second decoder that continues from the same state."""
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        other._utf8.setstate(self._utf8.getstate())
        return other

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, which may be empty.

        Raises TokenizerError if the id is outside the vocabulary.
        """
        tokenizer = self._tokenizer
        piece = tokenizer.token_bytes(token_id)
        if tokenizer.begins_fragment(token_id):
            self._space_expected = self._space_expected or tokenizer.space_prefix == "fragments"
            return self._utf8.decode(b"" if self._skip_special and tokenizer.is_hidden(token_id) else piece)
        if self._skip_special and tokenizer.is_hidden(token_id):
            return ""
        if self._space_expected and piece:
            self._space_expected = False
            return self._utf8.decode(piece.removeprefix(b" "))
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """End the text. Returns U+FFFD if a sequence is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)
