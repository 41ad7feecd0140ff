"""Vocabularies for generated models: small synthetic ones that can tokenise any text, or a copy from a GGUF file.

A vocabulary is the list of `tokenizer.*` metadata of a GGUF file. Synthetic ones have all 256 bytes, a few merges of
frequent English letters, and the special tokens of the model family; the rest up to `n_vocab` are filler words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from refengine.gguf.file import GGUFFile

V = GGUFValueType

MERGES = (  # noqa: SIM905
    "Ġ t,h e,i n,Ġ a,r e,o n,Ġt he,e r,n d,Ġ s,Ġ w,o u,i t,a n,l l,o r,e n,Ġ o,i s,in g,Ġa nd,Ġt o,Ġ b,Ġ c,a t,o m,"
    "Ġ m,v e,Ġo f,e d,Ġ f,Ġ p,Ġ d,e s,Ġ l,i on,Ġ is,Ġ in"
).split(",")

SPM_PIECES = "▁t er in ▁a en on ▁th ▁the es or an ▁s he re nd at ou ▁w it ▁c ▁o ed ing ▁and ▁to ▁of is al".split()  # noqa: SIM905

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Entry:
    """One metadata pair. element: the type of an array's elements."""

    key: str
    value: Any
    type: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class BPEFamily:
    """The special tokens of a byte-level BPE family, at the vocabulary's end, and which of them are BOS and EOS."""

    specials: tuple[str, ...]
    bos: str
    eos: str
    add_bos: bool = False
    chat_template: str = ""


BPE_FAMILIES = {
    "qwen2": BPEFamily(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", "<|im_end|>", chat_template=CHATML
    ),
    "gpt-2": BPEFamily(("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "gpt-4o": BPEFamily(
        ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"),
        "<|startoftext|>",
        "<|return|>",
    ),
    "llama-bpe": BPEFamily(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), "<|begin_of_text|>", "<|end_of_text|>", add_bos=True
    ),
}
VOCABS = (*BPE_FAMILIES, "llama-spm", "phi-3", "none")
SPM_SPECIALS = {"llama-spm": (), "phi-3": ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>")}


def default_size(kind: str) -> int:
    """The number of tokens of the small synthetic vocabulary of a kind."""
    return 416 if kind in SPM_SPECIALS else 320


def synthetic(kind: str, n_vocab: int) -> list[Entry]:
    """The metadata of a synthetic vocabulary of `n_vocab` tokens. Raises ValueError for an unknown kind or too few."""
    if kind == "none":
        return [Entry("tokenizer.ggml.model", "no_vocab", V.STRING)]
    if kind in BPE_FAMILIES:
        return _bpe(kind, n_vocab)
    if kind in SPM_SPECIALS:
        return _spm(kind, n_vocab)
    raise ValueError(f"unknown vocabulary {kind!r}; known: {', '.join(VOCABS)}")


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself if it is printable Latin-1, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _fillers(prefix: str, n_vocab: int, n_real: int) -> list[str]:
    if n_vocab < n_real:
        raise ValueError(f"{n_vocab} tokens are too few for this vocabulary, which needs {n_real}")
    return [f"{prefix}#{i}" for i in range(n_vocab - n_real)]


def _tokens(tokens: list[str], types: list[TokenType]) -> list[Entry]:
    return [
        Entry("tokenizer.ggml.tokens", tokens, V.ARRAY, V.STRING),
        Entry("tokenizer.ggml.token_type", [int(t) for t in types], V.ARRAY, V.INT32),
    ]


def _bpe(kind: str, n_vocab: int) -> list[Entry]:
    family = BPE_FAMILIES[kind]
    known = [*byte_characters(), *(m.replace(" ", "") for m in MERGES)]
    words = known + _fillers("Ġ", n_vocab, len(known) + len(family.specials))
    tokens = words + list(family.specials)
    template = [Entry("tokenizer.chat_template", family.chat_template, V.STRING)] if family.chat_template else []
    return [
        Entry("tokenizer.ggml.model", "gpt2", V.STRING),
        Entry("tokenizer.ggml.pre", kind, V.STRING),
        *_tokens(tokens, [TokenType.NORMAL] * len(words) + [TokenType.CONTROL] * len(family.specials)),
        Entry("tokenizer.ggml.merges", MERGES, V.ARRAY, V.STRING),
        Entry("tokenizer.ggml.bos_token_id", tokens.index(family.bos), V.UINT32),
        Entry("tokenizer.ggml.eos_token_id", tokens.index(family.eos), V.UINT32),
        Entry("tokenizer.ggml.add_bos_token", family.add_bos, V.BOOL),
        *template,
    ]


def _spm(kind: str, n_vocab: int) -> list[Entry]:
    specials = SPM_SPECIALS[kind]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = [*SPM_PIECES, "▁", *(chr(c) for c in range(33, 127))]
    fillers = _fillers("▁", n_vocab, len(head) + len(words) + len(specials))
    tokens = [*head, *words, *fillers, *specials]
    types = [
        *(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL),
        *[TokenType.BYTE] * 256,
        *[TokenType.NORMAL] * (len(words) + len(fillers)),
        *[TokenType.CONTROL] * len(specials),
    ]
    scores = [0.0] * len(head) + [float(-i) for i in range(len(words) + len(fillers))] + [0.0] * len(specials)
    return [
        Entry("tokenizer.ggml.model", "llama", V.STRING),
        Entry("tokenizer.ggml.pre", "default", V.STRING),
        *_tokens(tokens, types),
        Entry("tokenizer.ggml.scores", scores, V.ARRAY, V.FLOAT32),
        Entry("tokenizer.ggml.bos_token_id", 1, V.UINT32),
        Entry("tokenizer.ggml.eos_token_id", tokens.index("<|endoftext|>") if specials else 2, V.UINT32),
        Entry("tokenizer.ggml.unknown_token_id", 0, V.UINT32),
        Entry("tokenizer.ggml.add_bos_token", True, V.BOOL),
        Entry("tokenizer.ggml.add_eos_token", False, V.BOOL),
    ]


def copied(path: Path, n_vocab: int) -> list[Entry]:
    """The vocabulary of a GGUF file, padded to `n_vocab` tokens like in llama.cpp's converters.

    Raises GGUFError for a malformed file, ValueError for one without a vocabulary or with more than `n_vocab` tokens.
    """
    with GGUFFile(path) as gguf:
        if "tokenizer.ggml.tokens" not in gguf.metadata:
            raise ValueError(f"{path} holds no vocabulary (key tokenizer.ggml.tokens)")
        tokens = gguf.get("tokenizer.ggml.tokens", "strs")
        n_pad = n_vocab - len(tokens)
        if n_pad < 0:
            raise ValueError(f"{path} has {len(tokens)} tokens, more than the model's {n_vocab}")
        padding: dict[str, list[Any]] = {
            "tokenizer.ggml.tokens": [f"[PAD{len(tokens) + i}]" for i in range(n_pad)],
            "tokenizer.ggml.token_type": [int(TokenType.UNUSED)] * n_pad,
            "tokenizer.ggml.scores": [-1000.0] * n_pad,
        }
        entries: list[Entry] = []
        for key, value in gguf.metadata.items():
            if key.startswith("tokenizer."):
                name = gguf.type_name(key).removeprefix("array of ")
                if isinstance(value, (int, float, str)):
                    entries.append(Entry(key, value, GGUFValueType[name.upper()]))
                else:
                    entries.append(Entry(key, [*value, *padding.get(key, [])], V.ARRAY, GGUFValueType[name.upper()]))
    return entries
