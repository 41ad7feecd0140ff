"""Byte-level BPE from small GGUF vocabularies: cutting, merging, special tokens, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest

from refengine.errors import GGUFError, RefengineError, TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer import Tokenizer, load_tokenizer
from refengine.tokenizer.pretokenizers import PRE_TOKENIZERS
from tests.tokenizer.builder import BYTE_CHARS, CONTROL, NORMAL, UNUSED, USER_DEFINED, bpe_file, write_vocabulary


def load(gguf: GGUFFile) -> Tokenizer:
    tokenizer = load_tokenizer(gguf)
    assert tokenizer is not None
    return tokenizer


def texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_bytes(token_id).decode() for token_id in ids]


def words(path: Path, pre: str, text: str) -> list[str]:
    """How `pre` cuts a text before merging."""
    tokenizer: Any = load(bpe_file(path, pre=pre, ids={"bos_token_id": 0}))
    return [text[start:end] for _, (start, end) in tokenizer._library.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "I|'ll| buy| 12345| x|'|LL|\n | at| $|9|!!|\n"),
        ("qwen2", "I|'ll| buy| |1|2|3|4|5| x|'LL|\n| | at| $|9|!!\n"),
        ("llama-bpe", "I|'ll| buy| |123|45| x|'LL|\n| | at| $|9|!!\n"),
        ("gpt-4o", "I'll| buy| |123|45| x'LL|\n| | at| $|9|!!\n"),
        ("default", "I|'|ll| buy| |123|45| x|'|LL|\n | at| |$|9|!!|\n"),
    ],
)
def test_pre_tokenizer_cuts_as_its_expression_says(tmp_path: Path, pre: str, expected: str) -> None:
    text = "I'll buy 12345 x'LL\n  at $9!!\n"
    found = words(tmp_path / "v.gguf", pre, text)
    assert found == expected.split("|")
    assert "".join(found) == text


def test_o200k_cuts_before_upper_case_inside_a_word(tmp_path: Path) -> None:
    assert words(tmp_path / "a.gguf", "gpt-4o", "camelCase HTMLPage") == ["camel", "Case", " HTMLPage"]
    assert words(tmp_path / "b.gguf", "llama-bpe", "camelCase HTMLPage") == ["camelCase", " HTMLPage"]


def test_contractions_match_any_ascii_case_but_not_long_s(tmp_path: Path) -> None:
    for pre in ("qwen2", "llama-bpe"):
        assert words(tmp_path / f"{pre}.gguf", pre, "a'sb'Sc'ſ'rEx") == ["a", "'s", "b", "'S", "c", "'ſ", "'rE", "x"]
        assert words(tmp_path / f"{pre}.gguf", pre, "'ſx") == ["'ſx"]  # a letter like others


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_supported_pre_tokenizer_loses_nothing(tmp_path: Path, pre: str) -> None:
    tokenizer = load(bpe_file(tmp_path / "v.gguf", ["a b"], pre=pre, ids={"bos_token_id": 1}))
    text = "ab  \r\n\tA1b's ΑΒγ ١٢٣ e\u0301 👩\u200d👧 \u00a0\u3000x\x00 ''\"…//\n\n  "
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_unknown_pre_tokenizer_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    gguf = bpe_file(tmp_path / "v.gguf", pre="klingon")
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre is 'klingon'.*gpt-4o.*llama-bpe.*qwen2"):
        load_tokenizer(gguf)


def test_missing_pre_tokenizer_is_the_default_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load(bpe_file(tmp_path / "v.gguf", ["1 2", "12 3", "123 4"], pre=None))
    assert "tokenizer.ggml.pre is missing" in caplog.text
    assert texts(tokenizer, tokenizer.encode("1234")) == ["123", "4"]  # "default" cuts digits into threes


def test_lowest_rank_merges_first_and_of_equal_merges_the_first_counts(tmp_path: Path) -> None:
    tokens = [*BYTE_CHARS, "ab", "bc"]
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=["b c", "a b", "b c"], pre="gpt-2")
    tokenizer = load(GGUFFile(path))
    assert texts(tokenizer, tokenizer.encode("abc")) == ["a", "bc"]


def test_ignore_merges_takes_a_word_that_is_a_token(tmp_path: Path) -> None:
    tokens = [*BYTE_CHARS, "ab", "cd", "abcd"]  # no merge makes abcd
    for pre, expected in (("llama-bpe", ["abcd"]), ("gpt-2", ["ab", "cd"])):
        path = write_vocabulary(
            tmp_path / f"{pre}.gguf", "gpt2", tokens, merges=["a b", "c d"], pre=pre, ids={"bos_token_id": 0}
        )
        tokenizer = load(GGUFFile(path))
        assert texts(tokenizer, tokenizer.encode("abcd", add_special=False)) == expected


def test_control_tokens_are_parsed_on_request_and_user_defined_ones_always(tmp_path: Path) -> None:
    gguf = bpe_file(tmp_path / "v.gguf", special={"<ctl>": CONTROL, "<usr>": USER_DEFINED})
    tokenizer = load(gguf)
    text = "a<usr>b<ctl>c"
    assert tokenizer.encode(text, parse_special=True) == [97, 257, 98, 256, 99]
    assert tokenizer.encode(text) == [97, 257, 98, *b"<ctl>", 99]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([97, 256, 257], skip_special=True) == "a<usr>"
    assert tokenizer.decode([97, 256, 257]) == "a<ctl><usr>"


def test_longer_special_token_wins_over_the_one_it_contains_and_over_one_further_left(tmp_path: Path) -> None:
    tokenizer = load(bpe_file(tmp_path / "v.gguf", special={"<a>": CONTROL, "<a><b>": CONTROL, "x<a": CONTROL}))
    assert tokenizer.encode("<a><b><a>", parse_special=True) == [257, 256]
    assert tokenizer.encode("x<a><b>", parse_special=True) == [120, 257]


def test_bos_and_eos_follow_the_metadata(tmp_path: Path) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    plain = load(bpe_file(tmp_path / "a.gguf", ids=ids))
    assert plain.encode("a") == [97]
    both = load(bpe_file(tmp_path / "b.gguf", ids=ids, flags={"add_bos_token": True, "add_eos_token": True}))
    assert both.encode("a") == [1, 97, 2]
    assert both.encode("") == [1, 2]
    assert both.encode("a", add_special=False) == [97]
    llama3 = load(bpe_file(tmp_path / "c.gguf", pre="llama-bpe", ids=ids))
    assert llama3.encode("a") == [1, 97]
    switched_off = load(bpe_file(tmp_path / "d.gguf", pre="llama-bpe", ids=ids, flags={"add_bos_token": False}))
    assert switched_off.encode("a") == [97]


def test_adding_a_token_that_the_file_does_not_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"adds BOS, but tokenizer\.ggml\.bos_token_id is missing"):
        load_tokenizer(bpe_file(tmp_path / "v.gguf", pre="llama3"))
    assert load(bpe_file(tmp_path / "w.gguf")).bos_id is None


def test_end_of_generation_ids_come_from_metadata_and_well_known_texts(tmp_path: Path) -> None:
    special = {
        "<|im_end|>": CONTROL,
        "<|fim_pad|>": CONTROL,
        "<|fim_prefix|>": CONTROL,
        "<end>": CONTROL,
        "<eos>": NORMAL,
    }
    tokenizer = load(bpe_file(tmp_path / "v.gguf", special=special, ids={"eos_token_id": 7, "eot_token_id": 259}))
    assert tokenizer.eog_ids == {7, 256, 257, 259, 260}
    assert tokenizer.encode("<eos>") == list(b"<eos>")  # a token that looks like a control token is one
    assert tokenizer.encode("<eos>", parse_special=True) == [260]


def test_end_of_message_is_not_end_of_generation_in_harmony_vocabularies(tmp_path: Path) -> None:
    harmony = load(bpe_file(tmp_path / "v.gguf", special=dict.fromkeys(["<|end|>", "<|return|>", "<|call|>"], CONTROL)))
    assert harmony.eog_ids == {257, 258}
    other = load(bpe_file(tmp_path / "w.gguf", special=dict.fromkeys(["<|end|>", "<|return|>"], CONTROL)))
    assert other.eog_ids == {256, 257}


def test_unused_tokens_stand_for_nothing(tmp_path: Path) -> None:
    tokenizer = load(bpe_file(tmp_path / "v.gguf", special={"[PAD256]": UNUSED}))
    assert tokenizer.token_bytes(256) == b""
    assert tokenizer.encode("[PAD256]") == list(b"[PAD256]")


def test_text_with_a_byte_that_has_no_token_is_refused_not_dropped(tmp_path: Path) -> None:
    without_z = [char for char in BYTE_CHARS if char != "z"]
    tokenizer = load(GGUFFile(write_vocabulary(tmp_path / "v.gguf", "gpt2", without_z, merges=[], pre="gpt-2")))
    assert tokenizer.decode(tokenizer.encode("y")) == "y"
    with pytest.raises(TokenizerError, match="no token for byte 0x7A"):
        tokenizer.encode("yz")


def test_surrogates_are_refused_with_their_place(tmp_path: Path) -> None:
    tokenizer = load(bpe_file(tmp_path / "v.gguf"))
    with pytest.raises(TokenizerError, match=r"surrogate, U\+D83D, at character 2"):
        tokenizer.encode("ab\ud83d")
    assert tokenizer.encode("a\x00b") == [97, 0, 98]


@pytest.mark.parametrize("token_id", [-1, 256])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, token_id: int) -> None:
    tokenizer = load(bpe_file(tmp_path / "v.gguf"))
    with pytest.raises(TokenizerError, match=f"token id {token_id} is outside the vocabulary, 0 to 255"):
        tokenizer.decode([token_id])


ONE_KEY_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing"),
    "merge without space": ({"merges": ["a b", "ab"]}, "merge 1 is 'ab'; expected two"),
    "merge of three": ({"merges": ["a b c"]}, "merge 0 is 'a b c'; expected two"),
    "empty merge": ({"merges": [" "]}, "merge 0 is ' '; expected two"),
    "merge of what is no token": ({"merges": ["a bb"]}, "merge 'a bb' needs 'bb', which is not a token"),
    "merge into what is no token": ({"merges": ["a b"]}, "merge 'a b' needs 'ab', which is not a token"),
    "too few types": ({"types": [NORMAL] * 255}, "tokenizer.ggml.token_type has 255 entries for 256 tokens"),
    "id out of range": ({"ids": {"eos_token_id": 256}}, "tokenizer.ggml.eos_token_id is 256, outside the vocabulary"),
    "any id out of range": ({"ids": {"cls_token_id": 999}}, "tokenizer.ggml.cls_token_id is 999, outside"),
    "empty vocabulary": ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
    "duplicate": ({"tokens": ["x", "a", "x"]}, "token 'x' occurs twice, with ids 0 and 2"),
    "flag for id": ({"flags": {"eos_token_id": True}}, "'tokenizer.ggml.eos_token_id' is of type bool"),
    "id for flag": ({"ids": {"add_bos_token": 1}}, "'tokenizer.ggml.add_bos_token' is of type uint32"),
    "id for text": ({"pre": None, "ids": {"pre": 3}}, "'tokenizer.ggml.pre' is of type uint32"),
}


@pytest.mark.parametrize("fault", ONE_KEY_WRONG)
def test_malformed_metadata_is_refused_with_key_and_byte_offset(tmp_path: Path, fault: str) -> None:
    changes, message = ONE_KEY_WRONG[fault]
    settings: dict[str, Any] = {"model": "gpt2", "tokens": BYTE_CHARS, "merges": [], "pre": "gpt-2", **changes}
    gguf = GGUFFile(write_vocabulary(tmp_path / "v.gguf", **settings))
    with pytest.raises(RefengineError) as caught:
        load_tokenizer(gguf)
    assert isinstance(caught.value, GGUFError)
    assert message in str(caught.value)
    assert "v.gguf" in str(caught.value)
    assert "byte" in str(caught.value)


def test_empty_tokens_are_told_apart_as_in_llama_cpp(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", [*BYTE_CHARS, "", ""], merges=[], pre="gpt-2")
    assert load(GGUFFile(path)).token_text(257) == "[EMPTY_257]"
