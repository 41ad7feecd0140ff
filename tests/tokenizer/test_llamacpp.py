"""Side by side with llama.cpp, live: ids of tricky texts, the bytes of every token, and which tokens end generation."""

import ctypes
import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from refengine.gguf.file import GGUFFile
from refengine.model import PACKAGED_MODEL
from refengine.tokenizer import Tokenizer, load_tokenizer
from refengine.tokenizer.byte_level import BYTE_TO_CHAR
from refengine.tokenizer.pretokenizers import PRE_TOKENIZERS
from tests.tokenizer.builder import bpe_file

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `validate`)")
pytestmark = pytest.mark.llamacpp

SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)

MODELS = [
    "vocab/ggml-vocab-qwen2",
    "vocab/ggml-vocab-phi-3",
    "vocab/ggml-vocab-gpt-2",
    "vocab/ggml-vocab-llama-bpe",
    "vocab/ggml-vocab-llama-spm",
    "models/stories260K",
    str(PACKAGED_MODEL.with_suffix("")),  # an absolute path stays one, whatever folder it is joined to
]
GPT_OSS = "vocab/gpt-oss-o200k"

PIECES = [
    *("Hello", " world", "the", "THE", "ing", "a", "aB", "ABC", "naïve", "ß", "ſ", "İ", "АБв", "нещо", "ΑβΓ"),
    *("  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", "\x00", "\x01", "\x7f", "\ufeff", "\ufffd"),
    *("\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\u200d", "e\u0301", "\u0301", "\U0010ffff"),
    *("1", "12", "123", "1234", "12345678", "½", "٣٤", "१२३", "Ⅻ", "²"),
    *("'s", "'S", "'ll", "'LL", "'lL", "'Re", "'VE", "'m", "'D", "'t", "'ſ", "'", "’s", "''"),
    *("中文字", "日本語です", "한국어", "កាន់តែ", "สวัสดี", "नमस्ते", "שלום", "مرحبا"),
    *("😀", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽", "🇩🇪", "☎️"),
    *(".", "...", "!?", "//", "/", "\\", "_", "--", "=", "+", "$", "^", "~", "`", "|", "<", ">", '"', "“", "—", "…"),
    *("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>", "<|eot_id|>"),
    *("<|begin_of_text|>", "<0x0A>", "<0x41>", "[PAD151646]", "[PAD32011]", "▁", "▁▁", "Ġ", "Ċ", "<|", "|>"),
]


def is_old(char: str) -> bool:
    """Assigned in Unicode 3.2: llama.cpp knows Unicode 15.0, the tokenizers library 16.0, and both agree on these."""
    return unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs")


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(PIECES), st.text(st.characters(exclude_categories=("Cs", "Cn")).filter(is_old), max_size=6)
    ),
    max_size=12,
).map("".join)


class Peer:
    """llama.cpp's tokenizer of one file: the vocabulary only, no context."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert model, path
        self.vocab = llama_cpp.llama_model_get_vocab(model)  # lives as long as the model, which is never freed
        self.n_tokens: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self._piece = ctypes.create_string_buffer(1024)
        self._ids = (llama_cpp.llama_token * 4096)()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), self._ids, len(self._ids), add_special, parse_special)
        assert n >= 0
        return self._ids[:n]

    def token_bytes(self, token_id: int, special: bool) -> bytes:
        n = llama_cpp.llama_token_to_piece(self.vocab, token_id, self._piece, len(self._piece), 0, special)
        assert n >= 0
        return self._piece.raw[:n]

    def ends(self, token_id: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token_id))


@cache
def pair_of(folder: Path, name: str) -> tuple[Tokenizer, Peer]:
    path = folder / f"{name}.gguf"
    tokenizer = load_tokenizer(GGUFFile(path), "gguf")
    assert tokenizer is not None
    return tokenizer, Peer(path)


def assert_same_ids(tokenizer: Tokenizer, peer: Peer, text: str) -> None:
    for add_special in (False, True):
        for parse_special in (False, True):
            ids = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
            assert ids == peer.encode(text, add_special, parse_special), (text, add_special, parse_special)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Tokenizer, Peer]:
    return pair_of(shared_data, request.param)


def test_single_tricky_pieces_and_their_neighbours_give_the_same_ids(pair: tuple[Tokenizer, Peer]) -> None:
    tokenizer, peer = pair
    for index, piece in enumerate(PIECES):
        following = PIECES[(index * 7 + 3) % len(PIECES)]
        for text in (piece, f"{piece}{following}", f"a {piece} {following}\n"):
            assert_same_ids(tokenizer, peer, text)


def test_any_text_gives_the_same_ids(pair: tuple[Tokenizer, Peer]) -> None:
    tokenizer, peer = pair

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(TEXTS)
    def check(text: str) -> None:
        assert_same_ids(tokenizer, peer, text)

    check()


@pytest.mark.parametrize("name", [*MODELS, GPT_OSS])
def test_every_token_has_the_same_bytes_and_ends_generation_alike(shared_data: Path, name: str) -> None:
    tokenizer, peer = pair_of(shared_data, name)
    every_id = range(tokenizer.vocab_size)
    assert tokenizer.vocab_size == peer.n_tokens
    assert [i for i in every_id if tokenizer.token_bytes(i) != peer.token_bytes(i, special=True)] == []
    # Without special tokens llama.cpp prints nothing for the hidden ones, and the same as before for the others.
    shown = [b"" if tokenizer.is_hidden(i) else tokenizer.token_bytes(i) for i in every_id]
    assert [i for i in every_id if shown[i] != peer.token_bytes(i, special=False)] == []
    assert tokenizer.eog_ids == {i for i in every_id if peer.ends(i)}
    assert tokenizer.bos_id == llama_cpp.llama_vocab_bos(peer.vocab)
    assert tokenizer.eos_id == llama_cpp.llama_vocab_eos(peer.vocab)
    assert tokenizer.add_bos == llama_cpp.llama_vocab_get_add_bos(peer.vocab)
    assert tokenizer.add_eos == llama_cpp.llama_vocab_get_add_eos(peer.vocab)


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, None])
def test_every_pre_tokenizer_name_cuts_and_adds_bos_alike(tmp_path: Path, pre: str | None) -> None:
    """Any two neighbours of a small alphabet merge, so that every cut shows in the ids."""
    is_o200k = pre is not None and PRE_TOKENIZERS[pre] == PRE_TOKENIZERS["gpt-4o"]
    # llama.cpp's o200k expression has its own idea of upper case outside ASCII.
    alphabet = list("aAsLl123 '\n\r./=") + ([] if is_o200k else list("éÉ½"))
    units = ["".join(BYTE_TO_CHAR[byte] for byte in char.encode()) for char in alphabet]
    inside = [" ".join(unit) for unit in units if len(unit) > 1]
    merges = inside + [f"{left} {right}" for left in units for right in units]
    gguf = bpe_file(tmp_path / "v.gguf", merges, pre=pre, ids={"bos_token_id": 7})
    tokenizer = load_tokenizer(gguf)
    assert tokenizer is not None
    peer = Peer(gguf.path)
    generator = random.Random(5)
    for _ in range(150):
        assert_same_ids(tokenizer, peer, "".join(generator.choices(alphabet, k=generator.randint(1, 14))))


# llama.cpp's approximation of the o200k expression (`LLAMA_VOCAB_PRE_TYPE_GPT4O`), in Oniguruma syntax.
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_NOT_LOWER, _NOT_UPPER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
O200K_OF_LLAMA_CPP = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_NOT_LOWER}*{_NOT_UPPER}+{_CONTRACTIONS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NOT_LOWER}+{_NOT_UPPER}*{_CONTRACTIONS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_gpt_oss_differs_from_llama_cpp_in_its_o200k_expression_only(shared_data: Path) -> None:
    """With llama.cpp's expression in place of OpenAI's the ids are llama.cpp's, so nothing else differs.

    Markers of the chat format are left out: llama.cpp parses those even when told not to.
    """
    _, peer = pair_of(shared_data, GPT_OSS)
    tokenizer: Any = load_tokenizer(GGUFFile(shared_data / f"{GPT_OSS}.gguf"), "gguf")
    tokenizer._library.pre_tokenizer = Sequence(
        [Split(Regex(O200K_OF_LLAMA_CPP), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(TEXTS.filter(lambda text: "<|end|>" not in text))
    def check(text: str) -> None:
        assert_same_ids(tokenizer, peer, text)

    check()
    for piece in PIECES:
        if piece != "<|end|>":
            assert_same_ids(tokenizer, peer, piece)


def test_gpt_oss_known_differences_from_llama_cpp(shared_data: Path) -> None:
    tokenizer, peer = pair_of(shared_data, GPT_OSS)
    # Combining marks: tiktoken's ids, as in gpt-oss-o200k.gguf.out.
    assert tokenizer.encode("កាន់តែ") == [11400, 107516, 15867, 20804]
    assert peer.encode("កាន់តែ", True, False) == [11400, 22392, 14167, 15867, 20804]
    # Upper case outside ASCII inside a word: cut before it, so that no merge crosses ("о" and half of "Н" do there).
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("ЭтоНе")] == ["Это", "Не"]
    assert len(peer.encode("ЭтоНе", True, False)) == 5


def test_gpt_oss_escapes_markers_that_llama_cpp_parses_even_when_told_not_to(shared_data: Path) -> None:
    tokenizer, peer = pair_of(shared_data, GPT_OSS)
    for marker in ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>"):
        parsed = tokenizer.encode(marker, parse_special=True)
        assert peer.encode(marker, False, False) == parsed
        assert len(parsed) == 1
        assert not set(parsed) & set(tokenizer.encode(marker, parse_special=False))


def test_any_text_survives_encoding_and_any_ids_stream_alike(pair: tuple[Tokenizer, Peer]) -> None:
    tokenizer, _ = pair
    is_spm = tokenizer.kind == "gguf-spm"

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(TEXTS, st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    def check(text: str, ids: list[int]) -> None:
        expected = text.replace("\u2581", " ") if is_spm else text  # SentencePiece's sign for a space
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == expected
        stream = tokenizer.stream()
        assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids)

    check()
