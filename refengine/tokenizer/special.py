"""Special tokens: which ids end the generation, which are control tokens, and how text is split at them.

The rules are llama.cpp's (`llama_vocab::impl::load`, `tokenizer_st_partition`): token types from the file, then
corrections by the token's text, because many files have wrong types.

One intended difference from llama.cpp: it turns the markers of gpt-oss's chat format (`<|start|>`, `<|message|>`, ...)
into user-defined tokens so that they are printed, but then they are also recognised in text in which special tokens
should be ordinary text. Here they are printed, and they are ordinary text there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

from gguf import TokenType

# Tokens with these texts end the generation in every vocabulary.
_EOG_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)

# Fill-in-the-middle tokens by role: without a metadata key, the first of these texts that is in the vocabulary.
_FIM_TEXTS = {
    "pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "sep": ("<|file_sep|>",),
}
_FIM_THAT_END = ("pad", "rep", "sep")

_HARMONY_MARKERS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_PHI3_KEEP_SPACE_AFTER = ("<unk>", "<s>", "<|endoftext|>")
# Unicode's noncharacters, which text should not contain: 32 in a row, and the last two of each plane.
_NONCHARACTERS = [chr(c) for c in (*range(0xFDD0, 0xFDF0), *(p << 16 | e for p in range(17) for e in (0xFFFE, 0xFFFF)))]
_C_WHITESPACE = " \t\n\v\f\r"  # isspace() in the C locale


@dataclass(frozen=True)
class SpecialToken:
    """A token that text is split at."""

    id: int
    text: str
    is_control: bool  # recognised only if special tokens are to be parsed; otherwise it is ordinary text
    strip_right: bool  # white space after it is dropped


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of one vocabulary."""

    cuts: tuple[SpecialToken, ...]  # in the order in which text is split: the longest text first
    cut_ids: frozenset[int]
    hidden_ids: frozenset[int]  # omitted by decode(skip_special=True)
    eog_ids: frozenset[int]

    def partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Split `text` into fragments of ordinary text (never empty) and ids of special tokens.

        The tokens are searched one after another, the longest text first, in the fragments that the earlier ones left.
        If two tokens overlap, this is not the same as the leftmost match.
        """
        fragments: list[str | int] = [text] if text else []
        for token in self.cuts:
            if (parse_special or not token.is_control) and token.text in text:
                fragments = [part for fragment in fragments for part in _cut(fragment, token)]
        return fragments

    def mark(self, text: str, mark: str) -> str:
        """Insert a mark into every control token that is written out in `text`, or that begins at its end.

        Then no control token is found in the text, or in a longer text that it becomes a part of. Removing the marks
        restores the text. (A control token of one character cannot be marked; no known vocabulary has one.)
        """
        inside = {
            len(text) - n + 1 for n in range(1, min(self._longest, len(text) + 1)) if text[-n:] in self._beginnings
        }
        for token in self._control:
            start = text.find(token)
            while start >= 0:
                inside.add(start + 1)
                start = text.find(token, start + 1)
        cuts = [0, *sorted(inside), len(text)]
        return mark.join(text[a:b] for a, b in pairwise(cuts))

    @cached_property
    def _control(self) -> tuple[str, ...]:
        return tuple(token.text for token in self.cuts if token.is_control)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(text[:n] for text in self._control for n in range(1, len(text)))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._control), default=0)


def unused_mark(text: str) -> str | None:
    """A noncharacter that is not in `text`; None if it contains all of them."""
    return next((c for c in _NONCHARACTERS if c not in text), None)


def texts_in(value: Any) -> Iterator[str]:
    """Yields every string in a JSON-like value, including names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in chain(value, value.values() if isinstance(value, Mapping) else ()):
            yield from texts_in(inner)


def on_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON-like value with `change` applied to every string in it, including names."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {on_texts(k, change): on_texts(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [on_texts(v, change) for v in value]
    return value


def _cut(fragment: str | int, token: SpecialToken) -> list[str | int]:
    if isinstance(fragment, int) or token.text not in fragment:
        return [fragment]
    parts: list[str | int] = []
    start = 0
    while (match := fragment.find(token.text, start)) >= 0:
        if match > start:
            parts.append(fragment[start:match])
        parts.append(token.id)
        start = match + len(token.text)
        while token.strip_right and start < len(fragment) and fragment[start] in _C_WHITESPACE:
            start += 1
    if start < len(fragment):
        parts.append(fragment[start:])
    return parts


def find_special_tokens(
    tokens: Sequence[str],
    types: Sequence[int],
    id_of: Callable[[str], int | None],
    metadata_ids: dict[str, int],
    model_name: str,
) -> SpecialTokens:
    """The special tokens of a vocabulary.

    `metadata_ids`: role ("eos", "eot", "eom", "fim_pad", ...) to id, for the roles in the file or in the tokenizer's
    defaults. `model_name`: the file's `general.name`. In Phi-3 models, white space after special tokens is dropped;
    their files do not say so, so llama.cpp and this function recognise them by name.
    """
    special_types = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
    cut_ids = {i for i, kind in enumerate(types) if kind in special_types}
    control_ids = {i for i in cut_ids if types[i] != TokenType.USER_DEFINED}
    eog_ids = {metadata_ids[role] for role in ("eos", "eot", "eom") if role in metadata_ids}

    for text in _EOG_TEXTS:
        if (token_id := id_of(text)) is not None:
            eog_ids.add(token_id)
            control_ids.add(token_id)
    for role, texts in _FIM_TEXTS.items():
        named = metadata_ids.get(f"fim_{role}")
        found = next((i for i in map(id_of, texts) if i is not None), None) if named is None else None
        if found is not None:
            control_ids.add(found)
        token_id = found if named is None else named
        if token_id is not None and role in _FIM_THAT_END:
            eog_ids.add(token_id)

    def ends(*texts: str) -> bool:
        return any(id_of(text) in eog_ids for text in texts)

    shown_ids = {id_of(text) for text in _HARMONY_MARKERS}
    # gpt-oss and Solar: <|end|> ends a message, not the generation.
    calls = ends("<|call|>", "<|calls|>")
    if ends("<|end|>") and ((ends("<|return|>") and calls) or (calls and ends("<|flush|>"))):
        eog_ids -= {id_of("<|end|>")}
        shown_ids |= {id_of("<|end|>")}
    # Gemma 4 and PLaMo: </s> is ordinary text.
    if ends("</s>") and ends("<|tool_response>", "<|plamo:eos|>"):
        eog_ids -= {id_of("</s>")}
        control_ids -= {id_of("</s>")}
        cut_ids -= {id_of("</s>")}

    all_cut_ids = cut_ids | control_ids
    is_phi3 = any(name in model_name.lower() for name in ("phi-3", "phi3"))
    cuts = [
        SpecialToken(
            id=i,
            text=tokens[i],
            is_control=i in control_ids,
            strip_right=is_phi3 and tokens[i] not in _PHI3_KEEP_SPACE_AFTER,
        )
        for i in sorted(all_cut_ids)
    ]
    cuts.sort(key=lambda token: -len(token.text.encode()))
    return SpecialTokens(
        cuts=tuple(cuts),
        cut_ids=frozenset(all_cut_ids),
        hidden_ids=frozenset(control_ids - shown_ids),
        eog_ids=frozenset(eog_ids),
    )
