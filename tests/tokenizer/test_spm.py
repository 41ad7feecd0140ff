"""SentencePiece from small GGUF vocabularies: merging by score, byte fallback, the extra space, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from refengine.errors import GGUFError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer import Tokenizer, load_tokenizer
from refengine.tokenizer.spm_proto import build_model_proto
from tests.tokenizer.builder import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    spm_file,
    write_vocabulary,
)

PIECES = {"▁": -10.0, "a": -11.0, "b": -12.0, "c": -13.0, "ab": -2.0, "bc": -1.0, "▁a": -3.0, "é": -14.0}
ID = {piece: 259 + index for index, piece in enumerate(PIECES)}


def load(gguf: GGUFFile) -> Tokenizer:
    tokenizer = load_tokenizer(gguf)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def spm(tmp_path: Path) -> Tokenizer:
    return load(spm_file(tmp_path / "v.gguf", PIECES))


def texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in ids]


def test_highest_score_merges_first(spm: Tokenizer) -> None:
    assert texts(spm, spm.encode("abc")) == ["<s>", "▁a", "bc"]
    assert texts(spm, spm.encode("ab", add_special=False)) == ["▁", "ab"]


def test_what_has_no_piece_falls_back_to_its_bytes(spm: Tokenizer) -> None:
    assert texts(spm, spm.encode("é語\x00", add_special=False)) == ["▁", "é", "<0xE8>", "<0xAA>", "<0x9E>", "<0x00>"]
    assert spm.token_bytes(spm.encode("語")[-1]) == b"\x9e"
    assert spm.decode(spm.encode("é語\x00", add_special=False)) == "é語\x00"


@pytest.mark.parametrize("text", ["", " ", "   ", "a", " a", "  a  ", "\n", "\n a\r\n", "a\tb", "é é", "<s> a"])
def test_white_space_survives(spm: Tokenizer, text: str) -> None:
    assert spm.decode(spm.encode(text, add_special=False)) == text
    assert spm.decode(spm.encode(text), skip_special=True) == text


def test_a_space_goes_before_every_fragment_and_is_taken_away_again(spm: Tokenizer) -> None:
    ids = spm.encode("a</s>a <s> b", add_special=False, parse_special=True)
    assert texts(spm, ids) == ["▁a", "</s>", "▁a", "▁", "<s>", "▁", "▁", "b"]
    assert spm.decode(ids) == "a</s>a <s> b"


def test_without_space_prefix_no_space_is_added_or_removed(tmp_path: Path) -> None:
    tokenizer = load(spm_file(tmp_path / "v.gguf", PIECES, flags={"add_space_prefix": False}))
    assert texts(tokenizer, tokenizer.encode("a a", add_special=False)) == ["a", "▁a"]
    assert tokenizer.decode([ID["▁a"]]) == " a"


def test_text_that_continues_a_prompt_keeps_its_space(spm: Tokenizer) -> None:
    assert spm.stream().push(ID["▁a"]) == "a"
    assert spm.stream(prompt_ids=[1, ID["b"]]).push(ID["▁a"]) == " a"
    assert spm.stream(prompt_ids=[1]).push(ID["▁a"]) == "a"  # after BOS a text begins


def test_escaped_control_tokens_are_never_merged(tmp_path: Path) -> None:
    pieces = {"▁": -10.0, "<": -1.0, "s>": -1.0, "s": -2.0, ">": -2.0, "</": -1.0, "/": -3.0}
    tokenizer = load(spm_file(tmp_path / "v.gguf", pieces, {"<s><": CONTROL}))
    assert texts(tokenizer, tokenizer.encode("<s>", add_special=False)) == ["▁", "<", "s>"]
    assert texts(tokenizer, tokenizer.encode("</s>", add_special=False)) == ["▁", "</", "s>"]
    assert tokenizer.encode("<s></s>", add_special=False, parse_special=True) == [1, 2]


def test_user_defined_tokens_are_always_cut_out_even_with_spaces(tmp_path: Path) -> None:
    tokenizer = load(spm_file(tmp_path / "v.gguf", PIECES, {"<x>": USER_DEFINED, "   ": USER_DEFINED}))
    assert texts(tokenizer, tokenizer.encode("a<x>a   b", add_special=False)) == ["▁a", "<x>", "▁a", "   ", "▁", "b"]
    assert tokenizer.decode(tokenizer.encode("a<x>a   b", add_special=False)) == "a<x>a   b"


def test_phi3_by_name_drops_white_space_after_special_tokens(tmp_path: Path) -> None:
    special = {"<|user|>": CONTROL, "<|endoftext|>": CONTROL}
    for name, expected in (("Phi-3 mini", ["<|user|>", "▁a"]), ("Llama", ["<|user|>", "▁", "<0x0A>", "▁a"])):
        tokenizer = load(spm_file(tmp_path / f"{name}.gguf", PIECES, special, name=name))
        assert texts(tokenizer, tokenizer.encode("<|user|>\n a", add_special=False, parse_special=True)) == expected
        after_eot = tokenizer.encode("<|endoftext|>\n", add_special=False, parse_special=True)
        assert texts(tokenizer, after_eot) == ["<|endoftext|>", "▁", "<0x0A>"]


def test_file_without_token_types_decodes_byte_tokens(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁", "a"]
    tokenizer = load(GGUFFile(write_vocabulary(tmp_path / "v.gguf", "llama", tokens)))
    assert tokenizer.encode("a\n") == [1, 259, 260, 3 + 10]
    assert tokenizer.decode(tokenizer.encode("a\n", add_special=False)) == "a\n"


def test_integer_scores_are_scores(tmp_path: Path) -> None:
    from tests.gguf_builder import I32, STRING, GGUFBuilder

    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc"]
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama").pair("tokenizer.ggml.model", STRING, "llama")
    builder.array("tokenizer.ggml.tokens", STRING, tokens)
    builder.array("tokenizer.ggml.scores", I32, [0, 0, 0, -9, -9, -9, -9, -5, -4])
    tokenizer = load(GGUFFile(builder.write(tmp_path / "v.gguf")))
    assert texts(tokenizer, tokenizer.encode("abc", add_special=False)) == ["▁", "a", "bc"]


def test_vocabulary_without_bytes_gives_the_unknown_token(tmp_path: Path) -> None:
    tokens = ["<pad>", "<unk>", "▁", "a", "[PAD4]"]
    types = [UNKNOWN, UNKNOWN, NORMAL, NORMAL, UNUSED]
    ids = {"unknown_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    tokenizer = load(GGUFFile(write_vocabulary(tmp_path / "v.gguf", "llama", tokens, types, ids=ids)))
    assert tokenizer.encode("a語", add_special=False) == [2, 3, 1]
    assert tokenizer.token_bytes(4) == b""


def test_default_ids_outside_a_tiny_vocabulary_are_dropped(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "llama", ["a", "▁"], flags={"add_bos_token": False})
    tokenizer = load(GGUFFile(path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, None)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "too few scores": ({"scores": [0.0] * 260}, "tokenizer.ggml.scores has 260 entries for 261 tokens"),
    "too few types": ({"types": [NORMAL]}, "tokenizer.ggml.token_type has 1 entries for 261 tokens"),
    "score is NaN": ({"scores": [0.0, float("nan")] + [0.0] * 259}, "the score of token 1 is not a number"),
    "byte without number": ({"types": [BYTE] * 261}, "token 0 is a byte, but its text is '<unk>'"),
    "id out of range": ({"ids": {"bos_token_id": 261}}, "tokenizer.ggml.bos_token_id is 261, outside"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_metadata_is_refused(tmp_path: Path, fault: str) -> None:
    changes, message = MALFORMED[fault]
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁", "a"]
    gguf = GGUFFile(write_vocabulary(tmp_path / "v.gguf", "llama", tokens, **changes))
    with pytest.raises(GGUFError) as caught:
        load_tokenizer(gguf)
    assert message in str(caught.value)


def test_model_proto_is_what_the_library_reads_back() -> None:
    pieces = ["<unk>", "<s>", "▁a", "é" * 100, *BYTE_TOKENS]  # a length of 200 bytes takes a two-byte varint
    scores = [0.0, 0.0, -1.5, -2.25] + [0.0] * 256
    proto = build_model_proto(pieces, scores, [2, 3, 1, 5] + [6] * 256, unk_id=0, byte_fallback=True)
    library = SentencePieceProcessor(model_proto=proto)
    assert [library.id_to_piece(i) for i in range(library.get_piece_size())] == pieces
    assert [library.get_score(i) for i in range(4)] == scores[:4]
    assert library.unk_id() == 0
    assert library.is_control(1)
    assert library.is_unused(3)
    assert library.is_byte(4)
    assert library.encode(" a a", out_type=str) == ["▁a", "▁a"]  # nothing stripped, no space added
