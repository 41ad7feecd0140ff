"""Real vocabularies: every test case that llama.cpp (or, for gpt-oss, tiktoken) publishes ids for, and back again."""

from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from refengine.gguf.file import GGUFFile
from refengine.tokenizer import Tokenizer, load_tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
# name of the vocabulary, where the tokenizer comes from, whose inputs
VOCABULARIES = [
    ("ggml-vocab-qwen2", "gguf", "ggml-vocab-qwen2"),
    ("ggml-vocab-phi-3", "gguf", "ggml-vocab-phi-3"),
    ("ggml-vocab-gpt-2", "gguf", "ggml-vocab-gpt-2"),
    ("ggml-vocab-llama-bpe", "gguf", "ggml-vocab-llama-bpe"),
    ("ggml-vocab-llama-spm", "gguf", "ggml-vocab-llama-spm"),
    ("gpt-oss-o200k", "gguf", "ggml-vocab-qwen2"),
    ("gpt-oss-o200k", "hf-json", "ggml-vocab-qwen2"),
]
Source = Literal["auto", "gguf", "hf-json"]
each_vocabulary = pytest.mark.parametrize(
    ("name", "source", "inputs"), VOCABULARIES, ids=[f"{name}-{source}" for name, source, _ in VOCABULARIES]
)


@cache
def tokenizer_of(folder: Path, name: str, source: Source) -> Tokenizer:
    tokenizer = load_tokenizer(GGUFFile(folder / "vocab" / f"{name}.gguf"), source)
    assert tokenizer is not None
    return tokenizer


def published_cases(folder: Path, name: str, inputs: str) -> list[tuple[str, list[int]]]:
    """(text, ids) of each case; the text after the last separator is a case only where ids are given for it."""
    with open(folder / "vocab" / f"{inputs}.gguf.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    lines = (folder / "vocab" / f"{name}.gguf.out").read_text().splitlines()
    assert len(lines) in (len(texts), len(texts) - 1)
    assert len(lines) >= 46
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=False)]


@each_vocabulary
def test_encode_gives_published_ids_for_every_case(shared_data: Path, name: str, source: Source, inputs: str) -> None:
    tokenizer = tokenizer_of(shared_data, name, source)
    cases = published_cases(shared_data, name, inputs)
    found = [(text, tokenizer.encode(text, add_special=False)) for text, _ in cases]
    assert found == cases


@each_vocabulary
def test_decode_reverses_encode_for_every_case(shared_data: Path, name: str, source: Source, inputs: str) -> None:
    tokenizer = tokenizer_of(shared_data, name, source)
    for text, ids in published_cases(shared_data, name, inputs):
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


@each_vocabulary
def test_stream_gives_the_same_text_in_whole_code_points(
    shared_data: Path, name: str, source: Source, inputs: str
) -> None:
    tokenizer = tokenizer_of(shared_data, name, source)
    for text, ids in published_cases(shared_data, name, inputs):
        decoder = tokenizer.stream()
        parts = [decoder.push(token_id) for token_id in ids]
        assert "".join(parts) == text
        assert decoder.finish() == ""


@each_vocabulary
def test_token_bytes_of_encoded_text_are_its_utf8(shared_data: Path, name: str, source: Source, inputs: str) -> None:
    tokenizer = tokenizer_of(shared_data, name, source)
    prefix = b" " if tokenizer.kind == "gguf-spm" else b""
    for text, ids in published_cases(shared_data, name, inputs):
        expected = prefix + text.encode() if text else b""
        assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == expected


@pytest.mark.parametrize(
    ("name", "source", "kind", "bos", "eos", "eog", "add_bos"),
    [
        # qwen2's vocabulary has an ordinary token "</s>" (128247); llama.cpp ends there as well.
        ("ggml-vocab-qwen2", "gguf", "gguf-bpe", 151643, 151643, {151643, 151645, 128247}, False),
        ("ggml-vocab-phi-3", "gguf", "gguf-spm", 1, 32000, {2, 32000, 32007}, True),
        ("ggml-vocab-gpt-2", "gguf", "gguf-bpe", 50256, 50256, {50256}, False),
        ("ggml-vocab-llama-bpe", "gguf", "gguf-bpe", 128000, 128001, {128001, 128009}, True),
        ("ggml-vocab-llama-spm", "gguf", "gguf-spm", 1, 2, {2}, True),
        ("gpt-oss-o200k", "gguf", "gguf-bpe", 199998, 200002, {199999, 200002, 200012}, False),
        ("gpt-oss-o200k", "auto", "hf-json", 199998, 200002, {199999, 200002, 200012}, False),
    ],
)
def test_roles_of_real_vocabularies(
    shared_data: Path, name: str, source: Source, kind: str, bos: int, eos: int, eog: set[int], add_bos: bool
) -> None:
    tokenizer = tokenizer_of(shared_data, name, source)
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_id) == (kind, bos, eos)
    assert (tokenizer.eog_ids, tokenizer.add_bos, tokenizer.add_eos) == (frozenset(eog), add_bos, False)
    assert tokenizer.encode("a") == ([bos] if add_bos else []) + tokenizer.encode("a", add_special=False)


def test_phi3_drops_white_space_after_parsed_special_tokens(shared_data: Path) -> None:
    tokenizer = tokenizer_of(shared_data, "ggml-vocab-phi-3", "gguf")
    ids = tokenizer.encode("<|user|>\n Hi<|end|>\n<|assistant|>\n", add_special=False, parse_special=True)
    assert [tokenizer.token_text(i) for i in ids] == ["<|user|>", "▁Hi", "<|end|>", "<|assistant|>"]
    kept = tokenizer.encode("<s>\n", add_special=False, parse_special=True)
    assert [tokenizer.token_text(i) for i in kept] == ["<s>", "▁", "<0x0A>"]


def test_gpt_oss_markers_are_shown_and_other_control_tokens_hidden(shared_data: Path) -> None:
    for source in ("gguf", "hf-json"):
        tokenizer = tokenizer_of(shared_data, "gpt-oss-o200k", source)
        text = "<|start|>assistant<|channel|>final<|message|>Hi<|return|>"
        ids = tokenizer.encode(text, parse_special=True)
        assert len(ids) == 7
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special=True) == text.removesuffix("<|return|>")
        assert not tokenizer.eog_ids.intersection(tokenizer.encode(text))  # escaped: none of them is recognised
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text
