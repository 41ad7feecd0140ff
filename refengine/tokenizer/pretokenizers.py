"""Pre-tokenizers: how a byte-level BPE vocabulary splits text into words before merging.

A GGUF file names its pre-tokenizer in `tokenizer.ggml.pre`. Several names share one set of regular expressions
(llama.cpp, `llama_vocab::impl::load` and `llm_tokenizer_bpe`). Each name also determines whether a word that is itself
a token is used as that token (`ignore_merges`), and whether BOS is added if the file does not say.

The expressions have Oniguruma's syntax, which the `tokenizers` library uses. They are applied one after another, each
to the pieces that the one before has left; text that no expression matches becomes a separate piece.

There are two intended differences from llama.cpp:

- `gpt-4o` here is the published o200k expression. llama.cpp approximates it: its letters exclude combining marks and
  it knows upper and lower case in ASCII only, so it splits Khmer, Devanagari and mixed case outside ASCII where
  OpenAI's tokenizer does not. The model was trained on the ids of OpenAI's tokenizer.
- Letters, digits, marks and punctuation are those of the Unicode version of the `tokenizers` library (16.0 in release
  0.23); llama.cpp uses 15.0. Code points assigned since then may be split differently.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS_LOWER = r"'s|'t|'re|'ve|'m|'ll|'d"
# Not written as a case-insensitive group: it would also match U+017F (long s), which llama.cpp's does not.
_CONTRACTIONS_ANY = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s+(?!\S)|\s+"

_GPT2 = rf"{_CONTRACTIONS_LOWER}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _letters_and_digits(digits: str) -> str:
    """The expression that Llama 3 and Qwen 2 share; they differ only in how digits are grouped."""
    return (
        rf"(?:{_CONTRACTIONS_ANY})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
    )


_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?:{_CONTRACTIONS_ANY})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?:{_CONTRACTIONS_ANY})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
)

_GPT2_STEPS = (_GPT2,)
_LLAMA3_STEPS = (_letters_and_digits(r"\p{N}{1,3}"),)
_QWEN2_STEPS = (_letters_and_digits(r"\p{N}"),)
_O200K_STEPS = (_O200K,)
_DEFAULT_STEPS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split into words, and the defaults that the name implies."""

    steps: tuple[str, ...]  # regular expressions, applied one after another
    ignore_merges: bool = False  # a word that is itself a token becomes that token, without merges
    add_bos: bool = False  # used if `tokenizer.ggml.add_bos_token` is absent


def _named(names: str, pre_tokenizer: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre_tokenizer)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named("default", PreTokenizer(_DEFAULT_STEPS)),
    **_named(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling", PreTokenizer(_GPT2_STEPS)
    ),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer(_LLAMA3_STEPS, ignore_merges=True, add_bos=True),
    ),
    **_named("dbrx smaug-bpe", PreTokenizer(_LLAMA3_STEPS)),
    **_named(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreTokenizer(_QWEN2_STEPS)
    ),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer(_O200K_STEPS)),
}
