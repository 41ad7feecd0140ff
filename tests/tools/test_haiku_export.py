"""GGUF files from the kept checkpoints: the values as they are, and clear words where something is missing."""

from pathlib import Path

import numpy as np
import pytest

import refengine
from refengine.gguf.file import GGUFFile
from refengine.tokenizer import load_tokenizer
from tools.haiku.corpus import Corpus, chat
from tools.haiku.export import CHECKPOINT, SHARD_BYTES, export, load_checkpoint, main, write_gguf
from tools.haiku.specs import SPECS


@pytest.mark.parametrize(("name", "model"), [("haiku-f32", "dense"), ("haiku-experts-f32", "experts")])
def test_f32_file_has_the_checkpoints_values(name: str, model: str, tmp_path: Path) -> None:
    kept = load_checkpoint(model)
    with GGUFFile(export(name, tmp_path)) as gguf:
        assert gguf.tensors.keys() == kept.keys()
        for tensor, value in kept.items():
            stored = gguf.data(tensor).view(np.float32)
            assert np.array_equal(stored.reshape(value.shape), value.astype(np.float32)), tensor
        tokenizer = load_tokenizer(gguf)
    assert tokenizer is not None
    rendered = tokenizer.render_chat([{"role": "user", "content": "a haiku about tea"}])
    assert rendered == chat("a haiku about tea")  # the training data's form is the template's


def test_checkpoint_files_are_small() -> None:
    files = list(CHECKPOINT.glob("*.safetensors"))
    assert len(files) == 5
    assert all(f.stat().st_size <= SHARD_BYTES for f in files)


def test_corpus_tokens_all_come_from_the_tokenizer() -> None:
    """Every poem of the corpus comes back from its ids; most words are one token."""
    tokenizer = refengine.load().tokenizer
    texts = list(Corpus().documents(99, 200))
    n_words = sum(len(t.split()) for t in texts)
    n_ids = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert tokenizer.decode(ids) == text
        n_ids += len(ids)
    assert n_ids < 2.5 * n_words


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    weights = load_checkpoint("dense")
    del weights["blk.3.attn_k.bias"]
    with pytest.raises(ValueError, match=r"blk\.3\.attn_k\.bias"):
        write_gguf(tmp_path / "x.gguf", SPECS["dense"], weights, CHECKPOINT / "tokenizer.json")
    assert not (tmp_path / "x.gguf").exists()


def test_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "haiku-f32", "--checkpoint", str(tmp_path)]) == 2
    assert "no dense-*.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "haiku-q9"])
    assert "haiku-q4_k_m" in capsys.readouterr().err
