"""Requests of OpenAI's clients: fields that change nothing are taken, those that would are refused by name."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from refengine.worker.errors import WorkerError
from refengine.worker.http.openai_requests import ChatRequest, CompletionRequest
from refengine.worker.http.requests import parse
from tests.worker.server import Server, serving

MESSAGE = {"role": "user", "content": "Write a haiku about the ocean"}
CHAT = {"messages": [MESSAGE], "max_tokens": 40, "seed": 3}
COMPLETION = {"prompt": "Write a haiku", "max_tokens": 40, "seed": 3}
BODIES: dict[type, dict[str, Any]] = {ChatRequest: CHAT, CompletionRequest: COMPLETION}
PATHS: dict[type, str] = {ChatRequest: "/v1/chat/completions", CompletionRequest: "/v1/completions"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def read(kind: type, **fields: Any) -> Any:
    return parse(kind, json.dumps({**BODIES[kind], **fields}).encode())


def content_of(server: Server, **fields: Any) -> str:
    with server.client() as client:
        response = client.post(PATHS[ChatRequest], json={**CHAT, **fields})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


NULLABLE = {
    "temperature": 1.0,
    "top_p": 1.0,
    "n": 1,
    "stream": False,
    "stream_options": {"include_usage": False},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "stop": [],
    "user": "me",
}
NOTHING: dict[type, dict[str, Any]] = {
    CompletionRequest: {**NULLABLE, "best_of": 1, "echo": False, "logprobs": None, "suffix": None},
    ChatRequest: {
        **NULLABLE,
        "logprobs": False,
        "top_logprobs": None,
        "max_completion_tokens": 40,
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {},
        "tools": [],
        "audio": None,
        "modalities": None,
        "prediction": None,
        "reasoning_effort": None,
        "service_tier": None,
        "verbosity": None,
    },
}
CASES = [(kind, field) for kind, fields in NOTHING.items() for field in fields]


@pytest.mark.parametrize(("kind", "field"), CASES)
def test_null_and_the_default_ask_for_the_same_as_nothing(kind: type, field: str) -> None:
    expected = read(kind).sampling(60)
    for value in (None, NOTHING[kind][field]):
        assert read(kind, **{field: value}).sampling(60) == expected


def test_null_for_limit_and_seed_is_the_workers_choice() -> None:
    for kind in BODIES:
        params = read(kind, max_tokens=None, seed=None).sampling(60)
        assert (params.max_tokens, params.seed) == (60, None)


def test_all_of_them_at_once_are_answered(server: Server) -> None:
    for kind, fields in NOTHING.items():
        for values in (fields, dict.fromkeys(fields)):
            with server.client() as client:
                response = client.post(PATHS[kind], json={**BODIES[kind], **values})
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["logprobs"] is None


PART = {"type": "text", "text": "x"}
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (CompletionRequest, {"n": 2}, "n"),
    (CompletionRequest, {"n": True}, "n"),
    (CompletionRequest, {"best_of": 2}, "best_of"),
    (CompletionRequest, {"suffix": "x"}, "suffix"),
    (CompletionRequest, {"logit_bias": {"1": 5}}, "logit_bias"),
    (CompletionRequest, {"prompt": None}, "prompt"),
    (CompletionRequest, {"top_k": None}, "top_k"),
    (CompletionRequest, {"tools": []}, "tools"),
    (CompletionRequest, {"frequency_penalty": 0.1}, "frequency_penalty"),
    (CompletionRequest, {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    (ChatRequest, {"tools": [{"type": "function"}]}, "tools"),
    (ChatRequest, {"tool_choice": "auto"}, "tool_choice"),
    (ChatRequest, {"response_format": {"type": "json_object"}}, "response_format.type"),
    (ChatRequest, {"store": True}, "store"),
    (ChatRequest, {"store": 0}, "store"),
    (ChatRequest, {"metadata": {"a": "b"}}, "metadata"),
    (ChatRequest, {"reasoning_effort": "low"}, "reasoning_effort"),
    (ChatRequest, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (ChatRequest, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (
        ChatRequest,
        {"messages": [{"role": "user", "content": [PART, {"type": "input_audio", "text": ""}]}]},
        "messages[0].content[1].type",
    ),
    (
        ChatRequest,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]},
        "messages[0].content[0].image_url",
    ),
    (ChatRequest, {"messages": [{**MESSAGE, "name": ""}]}, "messages[0].name"),
    (ChatRequest, {"messages": [{**MESSAGE, "name": 65 * "x"}]}, "messages[0].name"),
    (ChatRequest, {"messages": [{**MESSAGE, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    (ChatRequest, {"messages": [{**MESSAGE, "tool_call_id": None}]}, "messages[0].tool_call_id"),
]


@pytest.mark.parametrize(("kind", "fields", "where"), REFUSED)
def test_what_is_not_offered_is_refused_by_name(kind: type, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(WorkerError) as caught:
        read(kind, **fields)
    assert caught.value.field == next(iter(fields))
    assert caught.value.message.startswith(f"{where}: ")


def test_max_completion_tokens_is_max_tokens() -> None:
    assert read(ChatRequest, max_completion_tokens=7, max_tokens=None).sampling(60).max_tokens == 7
    assert read(ChatRequest, max_completion_tokens=7, max_tokens=7).sampling(60).max_tokens == 7
    for given in ({"max_completion_tokens": 7}, {"max_completion_tokens": 61, "max_tokens": None}):
        with pytest.raises(WorkerError, match=r"^max_completion_tokens: given \d+, ") as caught:
            read(ChatRequest, **given).sampling(60)
        assert caught.value.field == "max_completion_tokens"


def test_content_in_parts_is_one_text(server: Server) -> None:
    expected = content_of(server)
    parts = [{"type": "text", "text": MESSAGE["content"]}]
    assert content_of(server, messages=[{**MESSAGE, "content": parts}]) == expected
    one_part_a_line = [{"type": "text", "text": line} for line in ("a", "", "b")]
    (message,) = read(ChatRequest, messages=[{"role": "user", "content": one_part_a_line}]).messages
    assert message.for_template() == {"role": "user", "content": "a\n\nb"}


def test_templates_get_a_name_where_there_is_one() -> None:
    plain, named = read(ChatRequest, messages=[MESSAGE, {**MESSAGE, "name": "Ada"}]).messages
    assert plain.for_template() == MESSAGE
    assert named.for_template() == {**MESSAGE, "name": "Ada"}


def test_the_message_of_an_answer_can_be_sent_back(server: Server) -> None:
    """As OpenAI's client for Python holds it, in which what an answer lacks is None."""
    said: dict[str, str | None] = {"role": "assistant", "content": content_of(server)}
    said |= {"refusal": None, "audio": None, "function_call": None, "tool_calls": None}
    assert content_of(server, messages=[MESSAGE, said, {"role": "user", "content": "Another one"}])


def test_a_model_by_its_name(server: Server) -> None:
    with server.client() as client:
        (entry,) = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/refengine haiku").json() == entry
        for other in ("other", "refengine%20haiku%2Fx", "a/b", "%ff"):
            response = client.get(f"/v1/models/{other}")
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["param"]) == (404, "invalid_request_error", "model")
