"""lm-evaluation-harness, as its users run it, against a worker: its log-likelihoods are our forward pass's."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import refengine
from tests.cli_runner import ENVIRONMENT
from tests.worker.server import Server, serving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="no lm-evaluation-harness (extra `harness`)"
)

TASKS = {
    "haiku_choice": """
task: haiku_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "haiku_rolling": """
task: haiku_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "haiku_generate": """
task: haiku_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}
TEXTS = ("the warp hums softly", "a heat sink whirls in the light", "rain falls on the old pond", "雨 and 🌧 again")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def samples(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What a run of the harness logged of each task."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data.jsonl"
    rows = [
        {
            "question": f"Write a haiku about {text.split()[1]}",
            "choices": [f"\n{other}" for other in TEXTS[:3]],
            "answer": i % 3,
            "text": text,
        }
        for i, text in enumerate(TEXTS)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task.replace("DATA", json.dumps(str(data))), encoding="utf-8")
    arguments = f"model=refengine,base_url={server.url}/v1/completions,num_concurrent=3,max_length=512"
    line = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    line += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--log_samples", "--output_path", str(folder)]
    offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(line, env={**ENVIRONMENT, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name in TASKS:
        (path,) = folder.rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(found[name]) == len(TEXTS)
    return found


@pytest.fixture(scope="module")
def model() -> refengine.Model:
    return refengine.load()


def ids_of(model: refengine.Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text, add_special=False, parse_special=True)


def log_likelihood(model: refengine.Model, ids: list[int], n_context: int) -> tuple[float, bool]:
    """Of ids[n_context:], and whether each of them is the likeliest."""
    logits = model.forward(ids).astype(np.float64)[n_context - 1 : -1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))[range(len(logits)), ids[n_context:]]
    return float(own.sum()), bool((logits.argmax(axis=1) == ids[n_context:]).all())


def arguments_of(sample: dict[str, Any]) -> list[list[Any]]:
    return [[one[f"arg_{i}"] for i in range(len(one))] for one in sample["arguments"].values()]


def test_log_likelihoods_of_choices(samples: dict[str, list[dict[str, Any]]], model: refengine.Model) -> None:
    for sample in samples["haiku_choice"]:
        for (context, continuation), response in zip(arguments_of(sample), sample["resps"], strict=True):
            ids = ids_of(model, context + continuation)
            expected, greedy = log_likelihood(model, ids, len(ids_of(model, context)))
            found, was_greedy = response[0]
            assert float(found) == pytest.approx(expected, abs=1e-4)
            assert was_greedy in (greedy, str(greedy))


def test_log_likelihoods_of_texts(samples: dict[str, list[dict[str, Any]]], model: refengine.Model) -> None:
    assert model.tokenizer is not None
    first = model.tokenizer.bos_id if model.tokenizer.bos_id is not None else model.tokenizer.eos_id
    assert first is not None
    for sample in samples["haiku_rolling"]:
        ((text,),) = arguments_of(sample)
        ids = [first, *ids_of(model, text)]  # as the harness begins a text
        assert float(sample["resps"][0][0]) == pytest.approx(log_likelihood(model, ids, 1)[0], abs=1e-4)


def test_greedy_answers(samples: dict[str, list[dict[str, Any]]], model: refengine.Model) -> None:
    for sample in samples["haiku_generate"]:
        params = refengine.SamplingParams(temperature=0, max_tokens=16, stop=("\n",))
        ids = ids_of(model, arguments_of(sample)[0][0])
        assert sample["resps"][0][0] == "".join(token.text for token in refengine.generate(model, ids, params))
