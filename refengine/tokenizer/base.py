"""`Tokenizer`: the interface of all tokenizers, and their common code.

Splitting at special tokens, BOS and EOS, decoding, streaming and chat templates are common. Each subclass defines how a
fragment of ordinary text becomes ids, and which bytes a token stands for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from refengine.errors import TokenizerError
from refengine.tokenizer.special import SpecialTokens, on_texts, texts_in, unused_mark
from refengine.tokenizer.stream import StreamDecoder

# Where the encoder adds a space: nowhere, before the text, or before every fragment of text (at the start and after
# each special token).
SpacePrefix = Literal["none", "start", "fragments"]


class Tokenizer(ABC):
    """Text to token ids and back.

    `decode(encode(text, add_special=False)) == text` for every text, except that a SentencePiece vocabulary turns
    U+2581 into a space, that Phi-3 drops white space after special tokens it has parsed, and that a `tokenizer.json`
    may normalise text (NFC).
    """

    kind: str  # "gguf-bpe", "gguf-spm" or "hf-json"
    vocab_size: int  # token ids are 0..vocab_size-1
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]  # end-of-generation tokens
    add_bos: bool  # whether encode(add_special=True) begins with BOS
    add_eos: bool
    chat_template: str | None  # jinja2 source
    space_prefix: SpacePrefix

    _special: SpecialTokens
    _roles: Mapping[str, int]

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """The ids of a fragment of ordinary text, which is not empty and has no special tokens to parse."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """The token's text as stored in the vocabulary. Raises TokenizerError for an id outside the vocabulary."""

    @abstractmethod
    def _token_bytes(self, token_id: int) -> bytes:
        """`token_bytes` of an id that is in the vocabulary."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of `text`.

        `add_special`: add BOS at the start if `add_bos`, and EOS at the end if `add_eos`.
        `parse_special`: recognise special tokens that are written out in the text; otherwise they are ordinary text, so
        untrusted text cannot contain special tokens. Tokens of type user-defined are always recognised.
        A rendered chat template already contains BOS: encode it with add_special=False, parse_special=True. Or use
        `encode_chat`, which also distinguishes the template's special tokens from those written in a message.
        Raises TokenizerError if the text has surrogates, which cannot be encoded as UTF-8.
        """
        _check_unicode(text)
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        ids += self._encode(text, parse_special)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation, rendered by the model's chat template.

        Only the template can make special tokens: one that is written out in a message is ordinary text, so a message
        cannot end itself and begin another. Raises the errors of `render_chat` and `encode`.
        """
        mark = unused_mark("".join(texts_in([self.chat_template, messages, variables])))
        if mark is None:
            raise TokenizerError("the messages contain all of Unicode's noncharacters, which text should not have")

        def marked(value: Any) -> Any:
            return on_texts(value, lambda text: self._special.mark(text, mark))

        rendered = self.render_chat(marked(messages), add_generation_prompt, marked(variables))
        _check_unicode(rendered)
        return self._encode(rendered, parse_special=True, mark=mark)

    def _encode(self, text: str, parse_special: bool, mark: str = "") -> list[int]:
        """The ids of `text`. A mark in it only hides special tokens (see `SpecialTokens.mark`), and is removed."""
        ids: list[int] = []
        for fragment in self._special.partition(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            elif ordinary := fragment.replace(mark, "") if mark else fragment:
                ids += self._encode_text(ordinary)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        `skip_special`: omit control tokens (but not the markers of gpt-oss's channels, without which its output cannot
        be understood). Raises TokenizerError for an id outside the vocabulary.
        """
        decoder = self.stream(skip_special=skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()

    def stream(self, *, skip_special: bool = False, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one at a time. `prompt_ids`: the ids before the first one, if any."""
        return StreamDecoder(self, skip_special=skip_special, prompt_ids=prompt_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a code point; for a special token, its text.

        Raises TokenizerError for an id outside the vocabulary.
        """
        self._check_id(token_id)
        return self._token_bytes(token_id)

    def begins_fragment(self, token_id: int) -> bool:
        """Whether text after this token is encoded like the start of a text."""
        return token_id in self._special.cut_ids

    def is_hidden(self, token_id: int) -> bool:
        """Whether decode(skip_special=True) omits this token."""
        return token_id in self._special.hidden_ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, rendered by the model's chat template; to be encoded with parse_special.

        `messages`: each with role, content and anything else that the template uses. `variables`: further names for the
        template (`tools`, `reasoning_effort`, ...). Raises TokenizerError if the model has no template, or the template
        is invalid, fails, refuses the messages or exceeds its limits; RequestError for messages of the wrong shape.
        """
        from refengine.tokenizer.chat import render_chat_template

        if self.chat_template is None:
            raise TokenizerError("the model has no chat template (tokenizer.chat_template); give a plain prompt")
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}
        texts = {name: self.token_text(self._roles[role]) for name, role in names.items() if role in self._roles}
        return render_chat_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={"bos_token": "", "eos_token": "", **texts, **(variables or {})},
        )

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary, 0 to {self.vocab_size - 1}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, vocab_size={self.vocab_size})"


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a surrogate, U+{ord(text[error.start]):04X}, at character {error.start};"
            " it is not valid Unicode (bytes decoded with the wrong encoding?)"
        ) from None
