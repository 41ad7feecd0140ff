"""The packaged model: three lines that scan, on topic, reproducible, from the command line and from the API."""

from pathlib import Path

import pytest

import refengine
from refengine.model import PACKAGED_MODEL
from refengine.weights import quant_kind
from tests.cli_runner import cli
from tools.haiku.corpus import Corpus, plain
from tools.haiku.evaluate import answers, ask

PROMPT = "Write a haiku about GPU computing"
MAX_BYTES = 4_000_000


@pytest.fixture(scope="module")
def model() -> refengine.Model:
    return refengine.load()


def test_packaged_file_is_a_small_trained_q4_k_m(model: refengine.Model) -> None:
    assert PACKAGED_MODEL.stat().st_size <= MAX_BYTES
    assert (model.config.arch, quant_kind(model.gguf)) == ("qwen2", "Q4_K_M")
    assert model.gguf.path == PACKAGED_MODEL


def test_generate_without_a_model_uses_the_packaged_one_and_says_so() -> None:
    result = cli("generate", PROMPT, "--seed", "42", "--temperature", "0.7")
    assert result.code == 0
    assert len(result.out.strip().split("\n")) == 3
    assert "packaged haiku model" in result.err


@pytest.mark.parametrize("command", [("tokenize", "the moon"), ("inspect",)])
def test_other_commands_take_the_packaged_model_too(command: tuple[str, ...]) -> None:
    result = cli(*command)
    assert result.code == 0
    assert "packaged haiku model" in result.err


def test_same_seed_gives_the_same_poem_and_another_seed_another(model: refengine.Model) -> None:
    poems = [ask(model, PROMPT, 0.7, seed) for seed in (42, 42, 43)]
    assert poems[0] == poems[1] != poems[2]


@pytest.mark.parametrize("seed", range(5))
def test_prompt_without_a_template_gets_three_lines(model: refengine.Model, seed: int) -> None:
    """What a client gets that sends the bare prompt: a line break first, then the poem."""
    params = refengine.SamplingParams(temperature=0.7, seed=seed, max_tokens=50)
    ids = model.tokenizer.encode(plain(PROMPT).rstrip("\n"))
    text = "".join(token.text for token in refengine.generate(model, ids, params))
    assert text.startswith("\n")
    assert Corpus().grammar.lexicon.scans(text.strip().split("\n")), text


@pytest.mark.ci
def test_held_out_requests_are_answered_in_form_and_on_topic(model: refengine.Model) -> None:
    """Bounds meant for 200 answers, on the first 60 of them; tools/haiku/evaluate.py runs all."""
    found = list(answers(model, Corpus(), 60, temperature=0.7))
    shares = {name: sum(getattr(a, name) for a in found) / len(found) for name in ("three_lines", "scans", "on_topic")}
    assert shares["three_lines"] >= 0.95, shares
    assert shares["scans"] >= 0.90, shares
    assert shares["on_topic"] >= 0.80, shares


def test_package_declares_the_model_as_its_data() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["refengine"]
    assert any(PACKAGED_MODEL.relative_to(Path(refengine.__file__).parent).match(p) for p in patterns)
