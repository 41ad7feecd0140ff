"""`refengine generate`: the published text, stop reasons, seeds, and the ways to give a prompt."""

import io
import json
import sys
from pathlib import Path

import pytest

import refengine
from tests.cli_runner import cli, write_llama, write_no_vocab, write_qwen2
from tests.gguf_builder import U32
from tests.model_files import rewrite
from tools.make_model import write_model

PUBLISHED = (  # greedy continuation of "Once upon a time", published by the model's author
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def no_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_no_vocab(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K.gguf"


def test_published_text(stories: Path) -> None:
    result = cli("generate", "Once upon a time", "--model", stories, "--temperature", 0, "--max-tokens", 200)
    assert result.code == 0
    assert result.out.startswith(PUBLISHED)
    assert result.out.endswith("\n")
    statistics = result.err.splitlines()[-1]
    assert "200 generated" in statistics
    assert "stop: length" in statistics
    assert "device cpu, numerics exact, KV cache float32" in result.err


def test_published_text_on_every_profile(stories: Path) -> None:
    for more in (["--numerics", "exact64"], ["--numerics", "llamacpp"], ["--cpu-cache-mb", 0], ["--chunk", 1]):
        result = cli("generate", "Once upon a time", "--model", stories, "--temperature", 0, "--max-tokens", 70, *more)
        assert result.code == 0
        assert PUBLISHED.startswith(result.out[:-1])
        assert len(result.out) > 150


def test_stop_string_across_tokens(stories: Path) -> None:
    result = cli("generate", "Once upon a time", "--model", stories, "--temperature", 0, "--stop", "little girl named")
    assert result.out == "Once upon a time, there was a \n"
    assert "stop: stop" in result.err
    ids = json.loads(cli("tokenize", "little girl named", "--model", stories, "--no-special").out)
    assert len(ids) > 2, "control: the stop string is several tokens"


def test_same_seed_same_text(stories: Path) -> None:
    def text(seed: int) -> str:
        more = ["--temperature", 1.2, "--max-tokens", 40, "--seed", seed]
        result = cli("generate", "One day", "--model", stories, *more)
        assert f"seed {seed}" in result.err
        return result.out

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_drawn_seed_is_reported_and_repeats_the_text(stories: Path) -> None:
    arguments = ["generate", "One day", "--model", stories, "--temperature", 1.2, "--max-tokens", 40]
    first = cli(*arguments)
    seed = first.err.split("seed ")[1].strip()
    assert cli(*arguments, "--seed", seed).out == first.out


def test_end_token_stops(llama: Path, tmp_path: Path) -> None:
    arguments = ["--ids", "5,9", "--temperature", 0, "--max-tokens", 6]
    params = refengine.SamplingParams(temperature=0, max_tokens=6)
    greedy = [token.id for token in refengine.generate(refengine.load(llama), [5, 9], params)]
    end = next(i for i in greedy if greedy.index(i) > 0)
    path = rewrite(llama, tmp_path / "ends.gguf", keys={"tokenizer.ggml.eos_token_id": (U32, end)})
    result = cli("generate", *arguments, "--model", path)
    assert f"{greedy.index(end) + 1} generated" in result.err
    assert "stop: eos" in result.err
    assert "6 generated" in cli("generate", *arguments, "--model", llama).err, "control"


def test_prompt_given_as_option_stdin_or_ids_is_the_same(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = cli("tokenize", "an ox", "--model", llama).out.strip()
    more = ["--model", llama, "--temperature", 0, "--max-tokens", 8]
    plain = cli("generate", "an ox", *more)
    assert cli("generate", "--prompt", "an ox", *more).out == plain.out
    for dash in (["-"], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("an ox"))
        assert cli("generate", *dash, *more).out == plain.out
    by_ids = cli("generate", "--ids", ids, *more)
    assert by_ids.code == 0
    assert "an ox" + by_ids.out == plain.out, "ids are not echoed"
    assert cli("generate", "--ids", ids.strip("[]"), *more).out == by_ids.out
    assert cli("generate", "--ids", "7, 8", *more).out != by_ids.out


def test_echo(llama: Path) -> None:
    more = ["--model", llama, "--temperature", 0, "--max-tokens", 4]
    continuation = cli("generate", "an ox", *more, "--no-echo").out
    assert not continuation.startswith("an ox")
    assert cli("generate", "an ox", *more).out == "an ox" + continuation
    assert cli("generate", "an ox", *more, "--echo").out == "an ox" + continuation
    by_ids = cli("generate", "--ids", "7,8", *more).out
    assert cli("generate", "--ids", "7,8", *more, "--echo").out == "7,8:" + by_ids


def test_chat_template_is_used_unless_told_not_to(model: Path) -> None:
    more = ["--model", model, "--temperature", 0, "--max-tokens", 4]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = cli("tokenize", rendered, "--parse-special", "--no-special", "--model", model).out.strip()
    by_ids = cli("generate", "--ids", ids, *more).out
    chat = cli("generate", "hi", *more)
    assert chat.out == by_ids, "the template's text, parsed; the prompt is not echoed"
    assert cli("generate", "hi", *more, "--chat").out == by_ids
    assert f"prompt {len(json.loads(ids))} tokens" in chat.err
    plain = cli("generate", "hi", *more, "--no-chat")
    assert plain.out.startswith("hi")
    assert plain.out != "hi" + by_ids


def test_chat_without_a_template_is_refused(llama: Path) -> None:
    result = cli("generate", "hi", "--chat", "--model", llama)
    assert result.code == 2
    assert "no chat template" in result.err.splitlines()[-1]


def test_file_without_vocabulary_generates_ids(no_vocab: Path) -> None:
    result = cli("generate", "--ids", "3,5", "--model", no_vocab, "--temperature", 0, "--max-tokens", 5)
    assert result.code == 0
    ids = [int(word) for word in result.out.split()]
    params = refengine.SamplingParams(temperature=0, max_tokens=5)
    expected = refengine.generate(refengine.load(no_vocab), [3, 5], params)
    assert ids == [token.id for token in expected]
    for arguments in (["generate", "text"], ["tokenize", "text"], ["logits", "--prompt", "a", "--output", "x.npz"]):
        refused = cli(*arguments, "--model", no_vocab)
        assert refused.code == 2
        assert "has no vocabulary" in refused.err.splitlines()[-1]


def test_learned_positions_bound_the_context(tmp_path: Path) -> None:
    write_model(tmp_path / "gpt2.gguf", "gpt2", "F32", n_layer=1, n_ctx=8)
    ids, output = "1,2,3,4,5,6,7,8,9", tmp_path / "x.npz"
    arguments = ["logits", "--ids", ids, "--model", tmp_path / "gpt2.gguf", "--output", output]
    assert "only 8 learned positions" in cli(*arguments, "--ctx", 9).error
    result = cli(*arguments)
    assert result.code == 2
    assert "9 tokens, but the context has 8" in result.err
