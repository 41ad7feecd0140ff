"""Streaming: text comes in whole code points, all of it, whatever the tokens split."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.builder import CONTROL, bpe_file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, ids 0..255, and a control token 256."""
    loaded = load_tokenizer(bpe_file(tmp_path_factory.mktemp("stream") / "v.gguf", special={"<é>": CONTROL}))
    assert loaded is not None
    return loaded


def test_a_code_point_comes_when_its_last_byte_does(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream()
    assert [decoder.push(byte) for byte in "é🦙x".encode()] == ["", "é", "", "", "", "🦙", "x"]
    assert decoder.finish() == ""


def test_incomplete_end_becomes_one_replacement_character(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream()
    assert [decoder.push(byte) for byte in "a🦙".encode()[:-1]] == ["a", "", "", ""]
    assert decoder.finish() == "\ufffd"


def test_bytes_that_never_complete_are_replaced_as_soon_as_that_is_known(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream()
    assert [decoder.push(byte) for byte in b"\xe8\xaaA\xffB"] == ["", "", "\ufffdA", "\ufffd", "B"]


def test_hidden_token_between_the_bytes_of_a_code_point_does_not_break_it(tokenizer: Tokenizer) -> None:
    first, second = "é".encode()
    decoder = tokenizer.stream(skip_special=True)
    assert [decoder.push(token_id) for token_id in (first, 256, second)] == ["", "", "é"]
    shown = tokenizer.stream()
    assert [shown.push(token_id) for token_id in (first, 256, 65)] == ["", "\ufffd<é>", "A"]


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.integers(0, 256), max_size=40), st.booleans())
def test_pushes_and_finish_are_decode(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    decoder = tokenizer.stream(skip_special=skip_special)
    parts = [decoder.push(token_id) for token_id in ids]
    whole = tokenizer.decode(ids, skip_special=skip_special)
    assert "".join(parts) + decoder.finish() == whole
    raw = b"".join(b"" if skip_special and i == 256 else tokenizer.token_bytes(i) for i in ids)
    assert whole == raw.decode(errors="replace")


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_streams_without_replacement(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.stream()
    parts = [decoder.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert decoder.finish() == ""
