"""The tokenizer of the haiku models: byte-level BPE, trained on the corpus, with Qwen2's way of cutting words.

    python -m tools.haiku.vocabulary tokenizer.json          # train it again, from the same corpus

`entries` gives it as the `tokenizer.*` metadata of a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gguf import GGUFValueType, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from refengine.tokenizer.pretokenizers import PRE_TOKENIZERS
from tools.haiku.corpus import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIALS, Corpus
from tools.haiku.specs import N_VOCAB
from tools.model_vocab import Entry

V = GGUFValueType
PRE = "qwen2"
DOCUMENTS, SEED = 60_000, 7


def train(corpus: Corpus) -> Tokenizer:
    """A byte-level BPE of N_VOCAB tokens: 256 bytes, merges, and the special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(step), "isolated") for step in PRE_TOKENIZERS[PRE].steps]
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    # Special tokens part the text at every place where they part it in use.
    texts = (piece for text in corpus.documents(SEED, DOCUMENTS) for piece in _without_specials(text))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def _without_specials(text: str) -> list[str]:
    for special in SPECIALS:
        text = text.replace(special, "\0")
    return [piece for piece in text.split("\0") if piece]


def entries(tokenizer: Tokenizer) -> list[Entry]:
    """The tokenizer as GGUF metadata: model `gpt2`, pre-tokenizer `qwen2`, and the chat template."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    types = [TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return [
        Entry("tokenizer.ggml.model", "gpt2", V.STRING),
        Entry("tokenizer.ggml.pre", PRE, V.STRING),
        Entry("tokenizer.ggml.tokens", tokens, V.ARRAY, V.STRING),
        Entry("tokenizer.ggml.token_type", [int(t) for t in types], V.ARRAY, V.INT32),
        Entry("tokenizer.ggml.merges", merges, V.ARRAY, V.STRING),
        Entry("tokenizer.ggml.bos_token_id", vocab[END_OF_TEXT], V.UINT32),
        Entry("tokenizer.ggml.eos_token_id", vocab[IM_END], V.UINT32),
        Entry("tokenizer.ggml.padding_token_id", vocab[END_OF_TEXT], V.UINT32),
        Entry("tokenizer.ggml.add_bos_token", False, V.BOOL),
        Entry("tokenizer.chat_template", CHAT_TEMPLATE, V.STRING),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vocabulary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="tokenizer.json")
    args = parser.parse_args(argv)
    tokenizer = train(Corpus())
    tokenizer.save(str(args.output), pretty=False)
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
