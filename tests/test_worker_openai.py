"""The routes of OpenAI's clients, and /tokenize and /detokenize: shapes, streams, errors; what is not offered."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import refengine
from tests.worker_server import HAIKU, Server, serving, text_of, until, write_talker

CHAT = {"messages": [{"role": "user", "content": "Write a haiku about the ocean"}], "seed": 3, "temperature": 0.7}


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
    choice = post(server, "/v1/completions", {**HAIKU, "stop": "shader"}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].endswith("soft ")
    choice = post(server, "/v1/completions", {**HAIKU, "max_tokens": 2}).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_chat_goes_through_the_template(server: Server, model: refengine.Model) -> None:
    answer = post(server, "/v1/chat/completions", CHAT).json()
    assert model.tokenizer is not None
    prompt = model.tokenizer.render_chat(CHAT["messages"])
    ids = model.tokenizer.encode(prompt, add_special=False, parse_special=True)
    params = refengine.SamplingParams(seed=3, temperature=0.7)
    expected = "".join(token.text for token in model.generate(ids, params))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert answer["usage"]["prompt_tokens"] == len(ids)
    chunks = chunks_of(post(server, "/v1/chat/completions", {**CHAT, "stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected
    assert chunks[-1]["choices"][0]["delta"] == {}


REFUSED = {
    "echo is not offered": ("/v1/completions", {**HAIKU, "echo": True}, "echo"),
    "log-probabilities are not offered": ("/v1/completions", {**HAIKU, "logprobs": 1}, "logprobs"),
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
    assert post(server, "/detokenize", {"tokens": tokens}).json() == {"content": text}
    special = post(server, "/tokenize", {"content": text, "parse_special": True}).json()["tokens"]
    assert len(special) <= len(tokens)
    assert post(server, "/detokenize", {"tokens": [99999]}).json()["field"] == "tokens"
    assert post(server, "/tokenize", {"content": 1}).status_code == 400


def test_cancel_and_disconnect_while_nothing_is_sent(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving("--model", write_talker(tmp_path_factory.mktemp("talker"))) as server, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "go on", "seed": 5}
        run = pool.submit(post, server, "/v1/completions", body)
        until(lambda: server.events("execute_start"))
        with server.client() as client:
            client.post("/cancel", json={"job_id": server.events("execute_start")[0]["job_id"]})
        response = run.result()
        assert (response.status_code, response.json()["error"]["code"]) == (499, "CANCELLED")
        with httpx.Client(base_url=server.url, timeout=0.1) as hasty, pytest.raises(httpx.ReadTimeout):
            hasty.post("/v1/completions", json=body)
        until(lambda: len(server.events("execute_end")) == 2)
        assert server.events("execute_end")[1]["outcome"] == "disconnected"
        server.settled()
