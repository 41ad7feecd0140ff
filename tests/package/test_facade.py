"""What `import refengine` gives: names that are imported when they are wanted, and that help() and dir() show."""

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import refengine
from refengine.errors import RequestError
from tests.cli_runner import write_no_vocab

ROOT = Path(__file__).resolve().parents[2]


def test_help_shows_the_public_names() -> None:
    text = pydoc.plain(pydoc.render_doc(refengine))
    for words in ("class Model", "class Trace", "class SamplingParams", "load(path"):
        assert words in text
    assert set(refengine.__all__) <= set(dir(refengine))


def test_import_brings_no_library() -> None:
    code = "import sys, refengine; sys.exit(sum(m in sys.modules for m in ('numpy', 'refengine.model', 'tokenizers')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def test_tokenizer_of_a_model_without_a_vocabulary(tmp_path: Path) -> None:
    model = refengine.load(write_no_vocab(tmp_path))
    assert model.vocabulary is None
    with pytest.raises(RequestError, match="has no vocabulary: give the prompt as ids"):
        _ = model.tokenizer
    packaged = refengine.load()
    assert packaged.tokenizer is packaged.vocabulary
