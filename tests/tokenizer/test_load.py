"""Which tokenizer a file gets, and that nothing is imported for it too early."""

import subprocess
import sys
from pathlib import Path

import pytest

from refengine.errors import GGUFError, RequestError, TokenizerError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer import load_tokenizer
from tests.gguf_builder import STRING, U32, GGUFBuilder
from tests.tokenizer.builder import BYTE_CHARS, bpe_file, spm_file, write_vocabulary


@pytest.mark.parametrize("model", [None, "no_vocab", "none"])
def test_file_without_vocabulary_has_no_tokenizer(tmp_path: Path, model: str | None) -> None:
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama").pair("llama.vocab_size", U32, 32)
    if model is not None:
        builder.pair("tokenizer.ggml.model", STRING, model)
    assert load_tokenizer(GGUFFile(builder.write(tmp_path / "v.gguf"))) is None


def test_kind_follows_the_model_key(tmp_path: Path) -> None:
    bpe = load_tokenizer(bpe_file(tmp_path / "a.gguf"))
    spm = load_tokenizer(spm_file(tmp_path / "b.gguf", {"▁": -1.0}))
    assert bpe is not None
    assert spm is not None
    assert (bpe.kind, bpe.vocab_size) == ("gguf-bpe", 256)
    assert (spm.kind, spm.vocab_size) == ("gguf-spm", 260)


def test_unsupported_vocabulary_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    gguf = GGUFFile(write_vocabulary(tmp_path / "v.gguf", "rwkv", ["a"]))
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model is 'rwkv'.*gpt2, llama"):
        load_tokenizer(gguf)


def test_tokens_without_a_model_key_are_malformed(tmp_path: Path) -> None:
    gguf = GGUFFile(write_vocabulary(tmp_path / "v.gguf", None, BYTE_CHARS))
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.model is missing, although the file has tokens"):
        load_tokenizer(gguf)


def test_asking_for_a_tokenizer_json_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json in its folder"):
        load_tokenizer(bpe_file(tmp_path / "v.gguf"), "hf-json")
    with pytest.raises(RequestError, match="unknown tokenizer source 'pickle'"):
        load_tokenizer(bpe_file(tmp_path / "w.gguf"), "pickle")  # type: ignore[arg-type]


def test_importing_the_package_imports_no_tokenizer_library() -> None:
    """sentencepiece is not asked for: the `gguf` package imports it by itself."""
    program = (
        "import sys, refengine.tokenizer\n"
        "rooms = [f'refengine.tokenizer.{name}' for name in ('bpe', 'spm', 'hf_json', 'chat')]\n"
        "print([name for name in ('tokenizers', 'jinja2', *rooms) if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
