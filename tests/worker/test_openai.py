"""The routes of OpenAI's clients, and /tokenize and /detokenize: shapes, streams, errors; what is not offered."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

import refengine
from tests.worker.server import HAIKU, Server, serving, text_of, until, write_talker

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Write a haiku about the ocean"}],
    "seed": 3,
    "temperature": 0.7,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def model() -> refengine.Model:
    return refengine.load()


def post(server: Server, path: str, body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=body)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream, whose last line must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *data, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in data]


def test_models_has_the_one(server: Server) -> None:
    with server.client() as client:
        (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["object"], entry["context_length"]) == ("refengine haiku", "model", 512)


def test_completion_is_what_execute_says(server: Server) -> None:
    answer = post(server, "/v1/completions", {**HAIKU, "model": "any"}).json()
    events = server.run(**HAIKU)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": text_of(events), "logprobs": None, "finish_reason": "stop"}
    end = events[-1][1]
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == end["tokens_in"]
    assert answer["usage"]["completion_tokens"] == end["tokens_out"]
    assert answer["usage"]["total_tokens"] == end["tokens_in"] + end["tokens_out"]


def test_completion_of_ids_is_that_of_their_text(server: Server, model: refengine.Model) -> None:
    ids = model.prompt_ids(HAIKU["prompt"])
    answers = [post(server, "/v1/completions", {**HAIKU, "prompt": p}).json() for p in (ids, HAIKU["prompt"])]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_completion_streams(server: Server) -> None:
    whole = post(server, "/v1/completions", HAIKU).json()
    body = {**HAIKU, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, usage = chunks_of(post(server, "/v1/completions", body))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert {c["choices"][0]["finish_reason"] for c in chunks} == {None}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({c["id"] for c in [*chunks, last, usage]}) == 1


def test_stop_and_length(server: Server) -> None:
    choice = post(server, "/v1/completions", {**HAIKU, "stop": "shader", "logprobs": 1}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])
    assert "shader" not in "".join(choice["logprobs"]["tokens"])
    assert choice["text"].endswith("soft ")
    choice = post(server, "/v1/completions", {**HAIKU, "max_tokens": 2}).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def expected_scores(model: refengine.Model, ids: list[int]) -> list[float]:
    """log-probabilities of ids[1:], from the model's own forward pass."""
    logits = model.forward(ids).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return [float(row[i]) for row, i in zip(log_softmax, ids[1:], strict=False)]


@pytest.mark.parametrize("as_text", [True, False])
def test_echo_with_logprobs_has_the_prompt_and_one_more(server: Server, model: refengine.Model, as_text: bool) -> None:
    text = "the warp hums, the heat sink whirls and 雨 falls " * 5
    ids = model.prompt_ids(text)
    assert len(ids) > 70  # more than is scored in one step
    body = {"prompt": text if as_text else ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2}
    for _ in range(2):  # the second time the prefix cache knows the prompt
        (choice,) = post(server, "/v1/completions", body).json()["choices"]
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(ids) + 1}
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1:-1], expected_scores(model, ids), atol=1e-4)  # lm-eval's
        assert choice["text"].startswith(text)
        for own, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert own in top.values()
            assert own <= max(top.values())
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


def test_nothing_but_the_prompt(server: Server) -> None:
    body = {"prompt": "the warp hums", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = post(server, "/v1/completions", body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the warp hums", "length")
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"]


def test_logprobs_of_what_is_generated(server: Server) -> None:
    (choice,) = post(server, "/v1/completions", {**HAIKU, "logprobs": 3}).json()["choices"]
    tokens = [data for name, data in server.run(**HAIKU, logprobs=3) if name == "token"]
    assert choice["logprobs"]["token_logprobs"] == [data["logprob"] for data in tokens]
    tops = [[one["logprob"] for one in data["top"]] for data in tokens]
    assert [sorted(top.values())[-3:][::-1] for top in choice["logprobs"]["top_logprobs"]] == tops


def test_several_prompts_give_a_choice_each(server: Server) -> None:
    prompts = ["Write a haiku about rain", "Write a haiku about the ocean", "Write a haiku about rain"]
    alone = [post(server, "/v1/completions", {**HAIKU, "prompt": p}).json()["choices"][0]["text"] for p in prompts]
    answer = post(server, "/v1/completions", {**HAIKU, "prompt": prompts}).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(alone))
    body = {**HAIKU, "prompt": prompts, "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    *chunks, usage = chunks_of(post(server, "/v1/completions", body))
    texts = ["", "", ""]
    for chunk in chunks:
        (part,) = chunk["choices"]
        texts[part["index"]] += part["text"]
    assert texts == [prompt + text for prompt, text in zip(prompts, alone, strict=True)]
    assert usage["usage"] == {**answer["usage"], "prompt_tokens_details": usage["usage"]["prompt_tokens_details"]}


@pytest.mark.parametrize("case", [{**HAIKU, "logprobs": 2, "echo": True}, {**HAIKU, "logprobs": 0}])
def test_a_stream_has_what_the_whole_has(server: Server, case: dict[str, Any]) -> None:
    (whole,) = post(server, "/v1/completions", case).json()["choices"]
    parts = [chunk["choices"][0] for chunk in chunks_of(post(server, "/v1/completions", {**case, "stream": True}))]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [one for part in parts if part["logprobs"] for one in part["logprobs"][name]] == values


def test_chat_with_logprobs(server: Server) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    (choice,) = post(server, "/v1/chat/completions", body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content[:-1]) == choice["message"]["content"]  # the last ends the turn
    for one in content:
        assert bytes(one["bytes"]).decode() == one["token"]
        assert len(one["top_logprobs"]) == 2
        assert one["logprob"] <= one["top_logprobs"][0]["logprob"] <= 0
    parts = [chunk["choices"][0] for chunk in chunks_of(post(server, "/v1/chat/completions", {**body, "stream": True}))]
    assert [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]] == content
    without = post(server, "/v1/chat/completions", {**CHAT, "logprobs": True}).json()["choices"][0]["logprobs"]
    assert [one["top_logprobs"] for one in without["content"]] == [[]] * len(content)


def test_chat_goes_through_the_template(server: Server, model: refengine.Model) -> None:
    answer = post(server, "/v1/chat/completions", CHAT).json()
    assert model.tokenizer is not None
    prompt = model.tokenizer.render_chat(CHAT["messages"])
    ids = model.tokenizer.encode(prompt, add_special=False, parse_special=True)
    params = refengine.SamplingParams(seed=3, temperature=0.7)
    expected = "".join(token.text for token in refengine.generate(model, ids, params))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert answer["usage"]["prompt_tokens"] == len(ids)
    chunks = chunks_of(post(server, "/v1/chat/completions", {**CHAT, "stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected
    assert chunks[-1]["choices"][0]["delta"] == {}


REFUSED = {
    "too many log-probabilities": ("/v1/completions", {**HAIKU, "logprobs": 21}, "logprobs"),
    "nothing to do": ("/v1/completions", {**HAIKU, "max_tokens": 0}, "max_tokens"),
    "texts and ids": ("/v1/completions", {**HAIKU, "prompt": ["a", [1]]}, "prompt"),
    "no prompts": ("/v1/completions", {**HAIKU, "prompt": [[]]}, "prompt"),
    "one bad prompt of two": ("/v1/completions", {**HAIKU, "prompt": [[5], [2048]]}, "prompt"),
    "an echo of ids out of the vocabulary": ("/v1/completions", {**HAIKU, "prompt": [-1], "echo": True}, "prompt"),
    "a template from the network": ("/v1/chat/completions", {**CHAT, "chat_template": "{{ 1 }}"}, "chat_template"),
    "alternatives without log-probabilities": ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
    "several choices": ("/v1/completions", {**HAIKU, "n": 2}, "n"),
    "penalties that are not there": ("/v1/completions", {**HAIKU, "presence_penalty": 1}, "presence_penalty"),
    "an id out of the vocabulary": ("/v1/completions", {**HAIKU, "prompt": [2048]}, "prompt"),
    "no ids": ("/v1/completions", {**HAIKU, "prompt": []}, "prompt"),
    "temperature": ("/v1/completions", {**HAIKU, "temperature": 3}, "temperature"),
    "no messages": ("/v1/chat/completions", {"messages": []}, "messages"),
    "a message without content": ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_openais_clients_read_it(server: Server, case: str) -> None:
    path, body, field = REFUSED[case]
    response = post(server, path, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, "INVALID_REQUEST", "invalid_request_error")
    assert error["param"] == field
    assert error["message"]


def test_unknown_route_under_v1(server: Server) -> None:
    response = post(server, "/v1/embeddings", {})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "INVALID_REQUEST")


def test_tokens_and_back(server: Server, model: refengine.Model) -> None:
    text = "Ελλάδα 🌧 <|im_end|>"
    tokens = post(server, "/tokenize", {"content": text}).json()["tokens"]
    assert tokens == model.prompt_ids(text)
    assert post(server, "/detokenize", {"tokens": tokens}).json() == {"content": text, "prompt": text}
    special = post(server, "/tokenize", {"content": text, "parse_special": True}).json()["tokens"]
    assert len(special) <= len(tokens)
    assert post(server, "/detokenize", {"tokens": [99999]}).json()["field"] == "tokens"
    assert post(server, "/tokenize", {"content": 1}).status_code == 400
    assert post(server, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"] == special
    assert post(server, "/tokenize", {"content": text, "prompt": text}).json()["field"] == "content"
    assert post(server, "/tokenize", {}).json()["field"] == "content"


def test_cancel_and_disconnect_while_nothing_is_sent(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving("--model", write_talker(tmp_path_factory.mktemp("talker"))) as server, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "go on", "seed": 5}
        run = pool.submit(post, server, "/v1/completions", body)
        until(lambda: server.events("execute_start"))
        with server.client() as client:
            client.post("/cancel", json={"job_id": server.events("execute_start")[0]["job_id"]})
        response = run.result()
        assert (response.status_code, response.json()["error"]["code"]) == (499, "CANCELLED")
        with server.client(read_s=0.1) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body)
        until(lambda: len(server.events("execute_end")) == 2)
        assert server.events("execute_end")[1]["outcome"] == "disconnected"
        server.settled()


def test_an_answers_id_cancels_all_its_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving("--model", write_talker(tmp_path_factory.mktemp("talker"))) as server, server.client() as client:
        body = {"prompt": ["go on", "and on", "and then"], "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            answer_id = json.loads(next(lines))["id"]
            assert post(server, "/cancel", {"job_id": answer_id}).status_code == 202
            *said, last = lines
        assert last == "[DONE]"
        errors = [json.loads(line)["error"]["code"] for line in said if '"error"' in line]
        assert errors == ["CANCELLED"] * 3
        assert [line["outcome"] for line in server.events("execute_end")] == ["cancelled"] * 3
        server.settled()
