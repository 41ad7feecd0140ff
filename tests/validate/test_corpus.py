"""Many prompts on many models: a row each, resumed where it stopped, summed up by model."""

import json
from pathlib import Path

import pytest

from refengine.errors import RequestError
from refengine.validate.corpus import Prompt, Settings, read_prompts, run_corpus
from tests.cli_runner import cli
from tests.model_files import ModelFiles

SELF = Settings(peer="refengine:exact64", numerics="exact")
PROMPTS = [Prompt("a", [1, 2, 3, 4]), Prompt("b", [9, 8, 7])]


def test_prompts_are_texts_ids_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('"an ox"\n\n[1, 2]\n{"prompt": "one", "id": "first"}\n{"ids": [3]}\n', encoding="utf-8")
    assert read_prompts(file) == [
        Prompt("line 1", "an ox"), Prompt("line 3", [1, 2]), Prompt("first", "one"), Prompt("line 5", [3]),
    ]  # fmt: skip


def test_a_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"one\u2028two"\r\n"three\x85"\r\n', encoding="utf-8")
    assert [p.value for p in read_prompts(tmp_path / "p.jsonl")] == ["one\u2028two", "three\x85"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no prompt"),
        ('"a"\n{', "line 2 is not JSON"),
        ("[]", "line 1 must be a string"),
        ('[1, "a"]', "line 1 must be"),
        ('{"text": "a"}', "line 1 must be"),
        ("7", "line 1 must be"),
        ("[true]", "line 1 must be"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "two prompts have the id '1'"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(RequestError, match=words):
        read_prompts(tmp_path / "p.jsonl")


def test_rows_of_two_processes_come_in_order_and_are_not_run_again(tiny_model: ModelFiles, tmp_path: Path) -> None:
    models = [tiny_model("llama-f32"), tiny_model("qwen2-q4_k_m")]
    output = tmp_path / "r.jsonl"
    counted: list[int] = []
    rows = run_corpus(models, PROMPTS, SELF, output, jobs=2, progress=counted.append)
    assert [(r["model"], r["prompt"]) for r in rows] == [(m.name, p) for m in models for p in ("a", "b")]
    assert all(r["verdict"] == "agrees" and r["least_margin"]["margin"] > 1 for r in rows)
    assert sum(counted) == 4
    written = output.read_text()
    assert sorted(json.loads(line)["key"] for line in written.splitlines()) == sorted(r["key"] for r in rows)
    counted.clear()
    assert run_corpus(models, PROMPTS, SELF, output, progress=counted.append) == rows
    assert counted == [4]
    assert output.read_text() == written


def test_a_run_that_was_cut_off_goes_on(tiny_model: ModelFiles, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    rows = run_corpus([tiny_model("llama-f32")], PROMPTS, SELF, output)
    first, second = output.read_text().splitlines(keepends=True)
    output.write_text(first + second[:40])  # the last line half written
    again = run_corpus([tiny_model("llama-f32")], PROMPTS, SELF, output)
    assert [r["key"] for r in again] == [r["key"] for r in rows]
    lines = output.read_text().splitlines()
    assert lines[0] == first.rstrip("\n")
    assert len(lines) == 2
    assert json.loads(lines[1])["prompt"] == "b"
    output.write_text("my notes\n" + first)
    with pytest.raises(RequestError, match="line 1 is not a result"):
        run_corpus([tiny_model("llama-f32")], PROMPTS, SELF, output)


def test_other_settings_are_another_run(tiny_model: ModelFiles, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    run_corpus([tiny_model("llama-f32")], PROMPTS[:1], SELF, output)
    other = Settings(peer="refengine:llamacpp", numerics="exact")
    run_corpus([tiny_model("llama-f32")], PROMPTS[:1], other, output)
    assert len(output.read_text().splitlines()) == 2


def test_the_command_sums_up_and_says_what_failed(tiny_model: ModelFiles, tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    prompts.write_text('[5, 6, 7, 8]\n{"id": "far", "ids": [999999]}\n')
    given = ("validate", "--numerics", "exact", "--prompts", prompts, "--output", output, "--jobs", "2")
    models = ("--model", tiny_model("llama-f32"), "--model", tiny_model("llama-q4_0"))
    result = cli(*given, *models, "--peer", "refengine:llamacpp,f32")
    assert result.code == 2
    assert "2 of 4 runs failed; the first is llama-f32.gguf far: token id 999999 is outside the" in result.err
    prompts.write_text("[5, 6, 7, 8]\n")
    result = cli(*given, *models, "--peer", "refengine:llamacpp,f32")
    assert result.code == 1  # Q4_0 products are rounded in one and not in the other
    f32, q4_0 = (line.split("│") for line in result.out.splitlines() if "llama-" in line)
    assert [cell.strip() for cell in f32[3:6]] == ["1", "1", "0"]
    assert [cell.strip() for cell in q4_0[3:6]] == ["1", "0", "1"]
    assert q4_0[7].strip().startswith("0.0 (")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output", "o.jsonl", "--ids", "1"), "--prompts compares live engines"),
        (("--output", "o.jsonl", "--peer", "my_dump"), "do not give a dump"),
        ((), "--prompts needs --output"),
        (("--output", "o.json"), "must end in .jsonl"),
        (("--output", "o.jsonl", "--jobs", "0"), "--jobs 0"),
    ],
)
def test_wrong_use_of_the_command(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("[1]\n")
    assert words in cli("validate", "--prompts", "p.jsonl", *arguments).error


def test_several_models_are_for_prompts() -> None:
    assert "only --prompts allows several" in cli("validate", "--model", "a", "--model", "b").error
    assert "--output and --jobs need --prompts" in cli("validate", "--model", "a", "--jobs", "2").error
