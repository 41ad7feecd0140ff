"""POST /execute on the packaged model: the events, the text, seeds, stop strings, log-probabilities; what is logged."""

import hashlib
import math
import re
from collections.abc import Iterator
from datetime import datetime

import pytest

import refengine
from tests.worker.server import HAIKU, Server, serving, text_of

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def model() -> refengine.Model:
    return refengine.load()


def test_haiku_is_the_same_twice(server: Server, model: refengine.Model) -> None:
    first, second = server.run(**HAIKU), server.run(**HAIKU)
    assert text_of(first) == text_of(second)
    assert len(text_of(first).strip().splitlines()) == 3
    params = refengine.SamplingParams(max_tokens=50, temperature=0.7, seed=42)
    assert text_of(first) == "".join(token.text for token in refengine.generate(model, HAIKU["prompt"], params))


def test_events_in_order_with_all_their_fields(server: Server) -> None:
    events = server.run(**HAIKU, job_id="fields")
    names = [name for name, _ in events]
    assert names == ["started", *["token"] * (len(events) - 2), "end"]
    started, end = events[0][1], events[-1][1]
    assert RFC3339.fullmatch(started.pop("started_at"))
    assert started == {"job_id": "fields", "model": "refengine haiku", "seed": 42, "queue_position": 0}
    assert [data["i"] for _, data in events[1:-1]] == list(range(len(events) - 2))
    assert all(set(data) == {"t", "i"} for _, data in events[1:-1])
    assert end["first_token_ms"] > 0
    assert end["decode_time_ms"] > 0
    assert {k: v for k, v in end.items() if not k.endswith("_ms")} == {
        "tokens_out": len(events) - 2,
        "stop_reason": "eos",
        "tokens_in": 6,
        "prefix_tokens_reused": 0,
    }


def test_length_ends_it(server: Server) -> None:
    events = server.run(**{**HAIKU, "max_tokens": 3})
    assert events[-1][1]["stop_reason"] == "length"
    assert events[-1][1]["tokens_out"] == 3


def test_seed_is_drawn_and_reported(server: Server) -> None:
    body = {"prompt": "The sea", "temperature": 1.5, "max_tokens": 20}
    first, other = server.run(**body), server.run(**body)
    seed = first[0][1]["seed"]
    assert 0 <= seed < 2**64
    assert seed != other[0][1]["seed"]
    assert text_of(server.run(**body, seed=seed)) == text_of(first)


def test_temperature_zero_is_greedy(server: Server) -> None:
    texts = {text_of(server.run(**{**HAIKU, "temperature": 0, "seed": seed})) for seed in (1, 2)}
    assert len(texts) == 1


def test_texts_concatenate_to_the_decoded_ids(server: Server, model: refengine.Model) -> None:
    events = server.run(prompt="Zażółć gęślą 雨 🌧", temperature=2.0, max_tokens=200, seed=7, logprobs=1)
    ids = [data["id"] for name, data in events if name == "token"]
    assert model.tokenizer is not None
    assert text_of(events) == model.tokenizer.decode(ids, skip_special=True)


@pytest.mark.parametrize("stop", ["shader", "r\nthe w", "ast soft"])
def test_stop_string_across_tokens_is_not_sent(server: Server, stop: str) -> None:
    whole = text_of(server.run(**HAIKU))
    events = server.run(**HAIKU, stop=["never there", stop])
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1][1]["stop_reason"] == "stop"


@pytest.mark.parametrize("stop", ["shader", "r\nthe w", "ast soft"])
def test_tokens_of_a_stop_string_are_not_told(server: Server, model: refengine.Model, stop: str) -> None:
    drawn = [data["id"] for name, data in server.run(**HAIKU, logprobs=1) if name == "token"]
    events = server.run(**HAIKU, logprobs=1, stop=["never there", stop])
    tokens = [data for name, data in events if name == "token"]
    assert [data["i"] for data in tokens] == list(range(events[-1][1]["tokens_out"]))
    told = [data["id"] for data in tokens if "id" in data]
    assert 0 < len(told) < len(tokens)
    assert told == drawn[: len(told)]
    assert model.tokenizer is not None
    assert model.tokenizer.decode(told).startswith(text_of(events))
    assert stop not in model.tokenizer.decode(told)


def test_tokens_that_were_no_stop_string_are_told_after_all(server: Server) -> None:
    free = [data for name, data in server.run(**HAIKU, logprobs=3) if name == "token"]
    text = "".join(data["t"] for data in free)
    held = [data for name, data in server.run(**HAIKU, logprobs=3, stop=[text[8:18] + "ZZZ"]) if name == "token"]
    assert [data["t"] for data in held] != [data["t"] for data in free]
    assert [{**data, "t": ""} for data in held] == [{**data, "t": ""} for data in free]


def test_logprobs_are_sent_where_asked_for(server: Server) -> None:
    for name, data in server.run(**HAIKU, logprobs=3):
        if name == "token":
            assert set(data) == {"t", "i", "id", "token", "logprob", "top"}
            assert len(data["top"]) == 3
            top = [entry["logprob"] for entry in data["top"]]
            assert top == sorted(top, reverse=True)
            assert data["logprob"] <= top[0] <= 0
            assert math.fsum(math.exp(p) for p in top) <= 1 + 1e-9
            assert all(isinstance(entry["token"], str) and entry["token"] for entry in data["top"])


def test_a_prompt_that_begins_alike_is_reused(server: Server) -> None:
    before = server.metric("worker_prefix_cache_hits_total")
    prompt = "the warp hums, the heat sink whirls and the light is gone " * 8
    first = server.run(prompt=prompt, max_tokens=4, seed=3)
    second = server.run(prompt=prompt, max_tokens=4, seed=3)
    assert second[-1][1]["prefix_tokens_reused"] >= 64
    assert text_of(first) == text_of(second)
    assert server.metric("worker_prefix_cache_hits_total") > before


def test_log_has_figures_and_no_content(server: Server) -> None:
    body = {**HAIKU, "prompt": "Write a haiku about the peculiar pangolin", "stop": ["unlikelystop"]}
    events = server.run(**body, job_id="logged")
    lines = [line for line in server.log if line.get("job_id") == "logged"]
    start, end = lines
    assert [start["event"], end["event"]] == ["execute_start", "execute_end"]
    assert start["prompt_sha256"] == hashlib.sha256(body["prompt"].encode()).hexdigest()
    assert start["prompt_chars"] == len(body["prompt"])
    assert end["outcome"] == events[-1][1]["stop_reason"]
    for key in ("tokens_in", "tokens_out", "first_token_ms", "decode_time_ms"):
        assert end[key] == events[-1][1][key]
    assert end["vram_bytes"] == 0
    for line in server.log:
        assert {"worker_id", "model_ref", "gpu_device", "event", "ts", "level"} <= set(line)
        datetime.fromisoformat(line["ts"])
    everything = server.log_file.read_text()
    said = [line for line in text_of(events).splitlines() if " " in line]
    assert said
    assert not [text for text in ["pangolin", "unlikelystop", *said] if text in everything]
