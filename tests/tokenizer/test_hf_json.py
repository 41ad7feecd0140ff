"""tokenizer.json beside the model: found, checked against the GGUF, and the same interface."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

import refengine
from refengine.errors import TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer import Tokenizer, load_tokenizer
from tests.gguf_builder import STRING, GGUFBuilder
from tests.tokenizer.builder import BYTE_CHARS, BYTE_TOKENS, CONTROL, NORMAL, USER_DEFINED, bpe_file, write_vocabulary
from tools.make_model import write_model

MERGES = ["a b", "ab c"]
SPECIAL = {"<s>": CONTROL, "</s>": CONTROL, "<usr>": USER_DEFINED}
BOS, EOS, USR = 258, 259, 260


def byte_level_json(path: Path, *, merges: list[str] = MERGES, adds_bos: bool = False) -> Path:
    """The same vocabulary as `bpe_file(merges, SPECIAL, pre="gpt-2")`."""
    made = [merge.replace(" ", "") for merge in merges]
    ids = {text: i for i, text in enumerate([*BYTE_CHARS, *made])}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    library = LibraryTokenizer(models.BPE(vocab=ids, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    library.add_tokens([AddedToken("<usr>", normalized=False)])
    if adds_bos:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    library.enable_truncation(3)  # as many published files have; it must not cut texts
    library.save(str(path))
    return path


def spm_like_json(path: Path, prefix: str) -> Path:
    """A SentencePiece vocabulary as tokenizer.json: `prefix` is "prepend", or a Metaspace scheme."""
    pieces = ["<unk>", "<s>", *BYTE_TOKENS, "▁", "a", "b", "▁a"]
    library = LibraryTokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(pieces)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if prefix == "prepend":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    library.save(str(path))
    return path


def no_vocabulary(path: Path) -> GGUFFile:
    return GGUFFile(GGUFBuilder().pair("tokenizer.ggml.model", STRING, "no_vocab").write(path))


def load(gguf: GGUFFile, source: Any = "auto") -> Tokenizer:
    tokenizer = load_tokenizer(gguf, source)
    assert tokenizer is not None
    return tokenizer


def test_json_and_gguf_of_one_vocabulary_agree(tmp_path: Path) -> None:
    gguf = bpe_file(
        tmp_path / "m.gguf",
        MERGES,
        SPECIAL,
        ids={"bos_token_id": BOS, "eos_token_id": EOS},
        flags={"add_bos_token": True},
    )
    byte_level_json(tmp_path / "tokenizer.json")
    from_json, from_gguf = load(gguf), load(gguf, "gguf")
    assert (from_json.kind, from_gguf.kind) == ("hf-json", "gguf-bpe")
    for text in ("", "abc abcab", "a<s>b</s><usr>c", "é🦙\x00\n  ", "<usr> <usr>"):
        for parse_special in (False, True):
            for add_special in (False, True):
                ids = from_json.encode(text, add_special=add_special, parse_special=parse_special)
                assert ids == from_gguf.encode(text, add_special=add_special, parse_special=parse_special)
        assert from_json.decode(from_json.encode(text, add_special=False)) == text
    for name in ("vocab_size", "bos_id", "eos_id", "eog_ids", "add_bos", "add_eos", "space_prefix"):
        assert getattr(from_json, name) == getattr(from_gguf, name), name
    every_id = range(from_gguf.vocab_size)
    assert [from_json.token_bytes(i) for i in every_id] == [from_gguf.token_bytes(i) for i in every_id]
    assert [from_json.is_hidden(i) for i in every_id] == [from_gguf.is_hidden(i) for i in every_id]


def test_special_tokens_are_parsed_or_escaped_in_any_order_of_calls(tmp_path: Path) -> None:
    byte_level_json(tmp_path / "tokenizer.json")
    tokenizer = load(no_vocabulary(tmp_path / "m.gguf"))
    for _ in range(2):
        assert tokenizer.encode("<s>", parse_special=True) == [BOS]
        assert tokenizer.encode("<s>") == list(b"<s>")
        assert tokenizer.encode("<usr>") == [USR]


def test_file_named_after_the_model_comes_first(tmp_path: Path) -> None:
    byte_level_json(tmp_path / "tokenizer.json", merges=["x y"])
    byte_level_json(tmp_path / "m.tokenizer.json")
    tokenizer = load(no_vocabulary(tmp_path / "m.gguf"))
    assert tokenizer.token_text(256) == "ab"
    other = load(no_vocabulary(tmp_path / "other.gguf"))
    assert other.token_text(256) == "xy"


def test_gguf_without_vocabulary_takes_bos_and_eos_from_the_post_processor(tmp_path: Path) -> None:
    byte_level_json(tmp_path / "tokenizer.json", adds_bos=True)
    tokenizer = load(no_vocabulary(tmp_path / "m.gguf"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (BOS, EOS, 261)
    assert tokenizer.encode("abc") == [BOS, 257, EOS]
    assert EOS in tokenizer.eog_ids


def test_long_texts_are_not_truncated_though_the_file_says_so(tmp_path: Path) -> None:
    byte_level_json(tmp_path / "tokenizer.json")
    assert len(load(no_vocabulary(tmp_path / "m.gguf")).encode("x y z x y z")) > 3


@pytest.mark.parametrize(
    ("prefix", "space_prefix"),
    [("prepend", "fragments"), ("always", "fragments"), ("first", "start"), ("never", "none")],
)
def test_sentencepiece_like_file_decodes_to_the_text(tmp_path: Path, prefix: str, space_prefix: str) -> None:
    spm_like_json(tmp_path / "tokenizer.json", prefix)
    tokenizer = load(no_vocabulary(tmp_path / "m.gguf"))
    assert tokenizer.space_prefix == space_prefix
    for text in ("a", "a a b", "b\n語", "a<s>a"):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text
    assert tokenizer.token_bytes(2 + 0xE8) == b"\xe8"


def test_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    gguf = bpe_file(tmp_path / "m.gguf", MERGES, SPECIAL)
    byte_level_json(tmp_path / "tokenizer.json", merges=["a c", "ac b"])
    with pytest.raises(TokenizerError, match=r"token 256 is 'ac', but 'ab' in m\.gguf.*another model"):
        load_tokenizer(gguf)
    assert load(gguf, "gguf").kind == "gguf-bpe"


def test_file_with_more_ids_than_the_model_has_is_refused(tmp_path: Path) -> None:
    gguf = GGUFFile(write_vocabulary(tmp_path / "m.gguf", "gpt2", BYTE_CHARS, merges=[], pre="gpt-2"))
    byte_level_json(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"has token id 260, but m\.gguf has only 256 tokens"):
        load_tokenizer(gguf)


def test_padding_of_the_gguf_is_no_disagreement(tmp_path: Path) -> None:
    tokens = [*BYTE_CHARS, "ab", "abc", *(f"[PAD{i}]" for i in range(258, 270))]
    types = [NORMAL] * 258 + [USER_DEFINED] * 12
    path = write_vocabulary(tmp_path / "m.gguf", "gpt2", tokens, types, merges=MERGES, pre="gpt-2")
    byte_level_json(tmp_path / "tokenizer.json")
    tokenizer = load(GGUFFile(path))
    assert tokenizer.vocab_size == 270
    assert tokenizer.token_text(BOS) == "<s>"
    assert tokenizer.token_bytes(265) == b"[PAD265]"


def bare_model(folder: Path, n_vocab: int) -> Path:
    """Random weights without a vocabulary."""
    write_model(folder / "bare.gguf", "llama", "F32", n_layer=1, vocab="none", n_vocab=n_vocab)
    return folder / "bare.gguf"


def test_rows_that_only_fill_the_embedding_up_are_no_text(tmp_path: Path) -> None:
    """The model draws them as any other id; nothing of an answer may fail for it."""
    byte_level_json(tmp_path / "tokenizer.json")
    model = refengine.load(bare_model(tmp_path, 500))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == model.config.n_vocab == 500
    assert tokenizer.decode([97, 261, 98, 499]) == "ab"
    assert tokenizer.token_text(261) == "[EMPTY_261]"
    params = refengine.SamplingParams(temperature=2.0, max_tokens=50, seed=3, logprobs=5)
    tokens = list(refengine.generate(model, "abc", params))
    drawn = [token.id for token in tokens]
    assert any(i > USR for i in drawn)
    assert "".join(token.text for token in tokens) == tokenizer.decode(drawn, skip_special=True)


def test_file_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    byte_level_json(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"has token id 260, but bare\.gguf has only 97 tokens; remove"):
        refengine.load(bare_model(tmp_path, 97))


def test_ids_that_the_file_leaves_out_are_no_text(tmp_path: Path) -> None:
    path = byte_level_json(tmp_path / "tokenizer.json", merges=[])
    settings = json.loads(path.read_text())
    settings["model"]["vocab"][BYTE_CHARS[255]] = 300
    path.write_text(json.dumps(settings))
    tokenizer = load(no_vocabulary(tmp_path / "m.gguf"))
    assert tokenizer.token_text(255) == "[EMPTY_255]"
    assert tokenizer.decode([97, 255, 98]) == "ab"


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"version": "1.0", "model": {"type": "Nonsense"}}'])
def test_broken_file_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: the tokenizers library cannot read it"):
        load_tokenizer(no_vocabulary(tmp_path / "m.gguf"))


def test_unknown_decoder_is_named(tmp_path: Path) -> None:
    path = byte_level_json(tmp_path / "tokenizer.json")
    settings = json.loads(path.read_text())
    for decoder, named in (({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"), (None, "missing")):
        path.write_text(json.dumps({**settings, "decoder": decoder}))
        with pytest.raises(TokenizerError, match=f"its decoder is {named}"):
            load_tokenizer(no_vocabulary(tmp_path / "m.gguf"))


def test_regular_expression_of_the_file_is_used(tmp_path: Path) -> None:
    path = byte_level_json(tmp_path / "tokenizer.json")
    library = LibraryTokenizer.from_file(str(path))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("b"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.save(str(path))
    assert load(no_vocabulary(tmp_path / "m.gguf")).encode("ab") == list(b"ab")
