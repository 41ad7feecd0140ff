"""What POST /execute and /cancel refuse, over HTTP: nothing of it starts any work, and the next request is served."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError, field_validator

from refengine.worker.errors import WorkerError
from refengine.worker.http import app
from refengine.worker.http.openai_requests import ChatRequest, CompletionRequest, DetokenizeRequest
from refengine.worker.http.requests import (
    MAX_BODY_BYTES,
    CancelRequest,
    ExecuteRequest,
    Strict,
    deadline_seconds,
    parse,
)
from tests.worker.server import HAIKU, Server, serving, text_of, until

OK = {"job_id": "v", "prompt": "x"}
HUGE = "9" * 5000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-tokens-in", 100, "--max-tokens-out", 60) as running:
        yield running


def with_(**fields: Any) -> str:
    return json.dumps({**OK, **fields})


REFUSED: dict[str, tuple[str | bytes, str | None]] = {
    "no job_id": ('{"prompt": "x"}', "job_id"),
    "empty job_id": (with_(job_id=""), "job_id"),
    "job_id a number": (with_(job_id=1), "job_id"),
    "no prompt": ('{"job_id": "v"}', "prompt"),
    "empty prompt": (with_(prompt=""), "prompt"),
    "long prompt": (with_(prompt="x" * 32769), "prompt"),
    "half a surrogate pair": ('{"job_id": "v", "prompt": "\\ud800"}', "prompt"),
    "max_tokens 0": (with_(max_tokens=0), "max_tokens"),
    "max_tokens 2049": (with_(max_tokens=2049), "max_tokens"),
    "max_tokens over the worker's": (with_(max_tokens=61), "max_tokens"),
    "max_tokens a float": (with_(max_tokens=1.5), "max_tokens"),
    "max_tokens text": (with_(max_tokens="5"), "max_tokens"),
    "max_tokens huge": (with_()[:-1] + f', "max_tokens": {HUGE}}}', None),
    "temperature below": (with_(temperature=-0.1), "temperature"),
    "temperature above": (with_(temperature=2.1), "temperature"),
    "temperature true": (with_(temperature=True), "temperature"),
    "temperature null": (with_(temperature=None), "temperature"),
    "temperature NaN": (with_(temperature=float("nan")), None),
    "temperature infinite": (with_(temperature=float("-inf")), None),
    "temperature beyond floats": (with_()[:-1] + ', "temperature": 1e999}', "temperature"),
    "top_p above": (with_(top_p=1.1), "top_p"),
    "top_k below": (with_(top_k=-1), "top_k"),
    "top_k over the vocabulary": (with_(top_k=2049), "top_k"),
    "min_p above": (with_(min_p=1.01), "min_p"),
    "repetition_penalty 0": (with_(repetition_penalty=0), "repetition_penalty"),
    "repetition_penalty above": (with_(repetition_penalty=2.01), "repetition_penalty"),
    "five stops": (with_(stop=list("abcde")), "stop"),
    "empty stop": (with_(stop=[""]), "stop"),
    "stop a string": (with_(stop="a"), "stop"),
    "stop of many tokens": (with_(stop=["qxz" * 40]), "stop"),
    "seed below": (with_(seed=-1), "seed"),
    "seed above": (with_(seed=2**64), "seed"),
    "logprobs above": (with_(logprobs=21), "logprobs"),
    "unknown field": (with_(best_of=2), "best_of"),
    "unknown field with strange characters": ('{"job_id": "v", "prompt": "x", "\\u00e9\\n": 1}', "é?"),
    "unknown field of half a surrogate pair": ('{"job_id": "v", "prompt": "x", "\\ud800": 1}', "?"),
    "that field twice": ('{"\\ud800": 1, "\\ud800": 2}', "?"),
    "a field twice": ('{"job_id": "v", "prompt": "x", "prompt": "y"}', "prompt"),
    "prompt over the worker's tokens": (with_(prompt="q z x " * 100), "prompt"),
    "no JSON": ("{", None),
    "empty body": ("", None),
    "a list": ("[]", None),
    "null": ("null", None),
    "deep": ("[" * 200_000, None),
    "no UTF-8": (b'{"job_id": "\xff"}', None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_code_message_and_field(server: Server, case: str) -> None:
    body, field = REFUSED[case]
    with server.client() as client:
        response = client.post("/execute", content=body)
    assert response.status_code == 400, response.text
    answer = response.json()
    assert set(answer) == {"code", "message", "field"}
    assert answer["code"] == "INVALID_REQUEST"
    assert answer["field"] == field
    assert answer["message"].isprintable()
    if field is not None:
        assert field.strip("?") in answer["message"]


def test_limits_themselves_are_allowed(server: Server) -> None:
    limits = {
        "max_tokens": 60,
        "temperature": 2,
        "top_p": 1,
        "top_k": 2048,
        "min_p": 0,
        "repetition_penalty": 2.0,
        "stop": list("%&#@"),
        "seed": 2**64 - 1,
        "logprobs": 20,
    }
    assert server.run(prompt="x", **limits)[-1][0] == "end"
    assert server.run(prompt="x", top_p=0.0, top_k=1, min_p=1.0, seed=0, max_tokens=1)[-1][0] == "end"


def test_default_of_max_tokens_is_the_workers_limit(server: Server) -> None:
    # Nearly uniform draws, so that it goes on to the limit; the seed is one for which it does.
    events = server.run(prompt="x", temperature=2.0, repetition_penalty=0.5, seed=1)
    assert events[-1][1]["tokens_out"] <= 60


def test_longest_prompt_of_characters_is_read(server: Server) -> None:
    with server.client() as client:
        body = with_(prompt="\U0001f327" * 32768)  # escaped: the largest body that is not refused for its size
        response = client.post("/execute", content=body)
    assert len(body) < MAX_BODY_BYTES
    assert (response.status_code, response.json()["field"]) == (400, "prompt")
    assert "tokens, allowed 1 to 100" in response.json()["message"]


def test_body_over_the_limit_gets_413(server: Server) -> None:
    with server.client() as client:
        response = client.post("/execute", content=b" " * (MAX_BODY_BYTES + 1))
        assert response.status_code == 413
        assert response.json()["code"] == "INVALID_REQUEST"
        assert client.post("/cancel", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413


@pytest.mark.parametrize("deadline", ["soon", "nan", "inf", "2030-01-01T00:00:00", "12:00Z", ""])
def test_deadline_that_is_none_is_refused(server: Server, deadline: str) -> None:
    with server.client() as client:
        response = client.post("/execute", json=OK, headers={"X-Deadline": deadline})
    assert (response.status_code, response.json()["field"]) == (400, "X-Deadline")


@pytest.mark.parametrize("deadline", ["0", "-3", "2001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00"])
def test_deadline_that_has_passed_is_504(server: Server, deadline: str) -> None:
    with server.client() as client:
        response = client.post("/execute", json=OK, headers={"X-Deadline": deadline})
    assert (response.status_code, response.json()["code"]) == (504, "INFERENCE_TIMEOUT")


@pytest.mark.parametrize("deadline", ["1e300", "9999-12-31T23:59:59-14:00"])
def test_deadline_however_far_leaves_the_workers_limit(server: Server, deadline: str) -> None:
    with server.client() as client:
        response = client.post("/execute", json={**OK, "max_tokens": 1}, headers={"X-Deadline": deadline})
    assert response.status_code == 200
    until(lambda: server.events("execute_start"))
    assert server.events("execute_start")[-1]["deadline_sec"] == 300


def test_deadline_in_seconds_or_rfc3339() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert deadline_seconds(None, now) is None
    assert deadline_seconds("2.5", now) == 2.5
    assert deadline_seconds("2030-01-01T00:00:07Z", now) == 7
    assert deadline_seconds("2030-01-01T02:00:07+02:00", now) == 7
    assert deadline_seconds((now + timedelta(seconds=1.5)).isoformat(), now) == 1.5


def test_refusals_are_counted_and_logged_without_content(server: Server) -> None:
    before = server.metric("worker_requests_total", outcome="refused")
    with server.client() as client:
        client.post("/execute", json={**OK, "stop": ["armadillo" * 30]})
        client.post("/execute", json={**OK, "armadillo": 1, "temperature": 9})
    assert server.metric("worker_requests_total", outcome="refused") == before + 2
    assert "armadillo" not in server.log_file.read_text()


CHAT = {"messages": [{"role": "user", "content": "x"}]}
WORDS: dict[str, tuple[type[Strict], dict[str, Any], str]] = {
    "a field of a message is missing": (ChatRequest, {"messages": [{"content": ""}]}, "messages[0].role: is missing"),
    "another field": (
        ChatRequest,
        {"messages": [*CHAT["messages"], {"1": 0}]},
        "messages[1].1: unknown field, allowed role, content",
    ),
    "no message": (ChatRequest, {"messages": [5]}, "messages[0]: given 5; Input should be an object"),
    "a nested field": (
        ChatRequest,
        {**CHAT, "stream_options": {"x": 1}},
        "stream_options.x: unknown field, allowed include_usage",
    ),
    "a value of the one kind of two": (
        CompletionRequest,
        {"prompt": "x", "stop": ["y", ""]},
        "stop[1]: given a string of 0 characters; String should have at least 1 character",
    ),
    "too many values": (
        CompletionRequest,
        {"prompt": [1] * 131073},
        "prompt: given a list of 131073; List should have at most 131072 items",
    ),
    "a value of neither kind": (CompletionRequest, {"prompt": 5}, "prompt: given 5; Input should be a valid string"),
    "ids in a list of lists": (
        CompletionRequest,
        {"prompt": [[1], [1, "x"]]},
        "prompt[1][1]: given a string of 1 characters; Input should be a valid integer",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_say_where_in_the_body_it_is(case: str) -> None:
    kind, body, words = WORDS[case]
    with pytest.raises(WorkerError) as caught:
        parse(kind, json.dumps(body).encode())
    assert caught.value.message.startswith(words)
    assert caught.value.field == re.match(r"\w+", words)[0]  # type: ignore[index]


def test_long_stop_is_refused_before_the_engine_cuts_it_into_tokens() -> None:
    stop = "x" * 4097
    for kind, given in ((ExecuteRequest, [stop]), (CompletionRequest, [stop]), (CompletionRequest, stop)):
        body = {"job_id": "v"} if kind is ExecuteRequest else {}
        with pytest.raises(WorkerError, match="at most 4096 characters") as caught:
            parse(kind, json.dumps({**body, "prompt": "x", "stop": given}).encode())
        assert (caught.value.code, caught.value.field) == ("INVALID_REQUEST", "stop")


MANY: dict[str, tuple[type[Strict], dict[str, Any]]] = {
    "texts in lists": (CompletionRequest, {"prompt": [[""] * 5000] * 60}),
    "texts for ids": (DetokenizeRequest, {"tokens": [""] * 131072}),
    "numbers that are no ids": (CompletionRequest, {"prompt": [1.5] * 131072}),
    "unknown fields": (CompletionRequest, {str(i): 0 for i in range(95_000)}),
    "unknown fields of a message": (ChatRequest, {"messages": [{str(i): 0 for i in range(95_000)}]}),
    "messages": (ChatRequest, {"messages": [{"role": "", "content": 0}] * 1024}),
}


@pytest.mark.parametrize("case", MANY)
def test_of_very_many_errors_only_a_few_are_collected(case: str) -> None:
    kind, body = MANY[case]
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(("n_bytes", "is_aside"), [(65536, False), (65537, True)])
def test_long_body_is_parsed_beside_the_event_loop(n_bytes: int, is_aside: bool) -> None:
    threads: list[Any] = []

    class Noted(CancelRequest):
        @field_validator("job_id")
        @classmethod
        def note(cls, job_id: str) -> str:
            threads.append(threading.current_thread())
            return job_id

    async def stream() -> AsyncIterator[bytes]:
        yield b'{"job_id":"a"}'.ljust(n_bytes)

    worker: Any = SimpleNamespace(run_aside=asyncio.to_thread)
    request: Any = SimpleNamespace(stream=stream)
    assert asyncio.run(app.parsed(worker, request, Noted)).job_id == "a"
    assert [thread is not threading.main_thread() for thread in threads] == [is_aside]


def test_cancel_wants_a_job_id(server: Server) -> None:
    with server.client() as client:
        assert client.post("/cancel", json={}).json()["field"] == "job_id"
        assert client.post("/cancel", content="x").status_code == 400


def test_served_after_all_that(server: Server) -> None:
    assert text_of(server.run(**HAIKU)).count("\n") == 3
    server.settled()
    assert server.process.poll() is None


def test_parse_gives_defaults() -> None:
    request = parse(ExecuteRequest, json.dumps(OK).encode())
    assert request.sampling(60).max_tokens == 60
    assert request.sampling(60).logprobs is None
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (1.0, 1.0, 0, 0.0)
    assert (request.repetition_penalty, request.stop, request.seed) == (1.0, [], None)
    assert parse(CancelRequest, b'{"job_id": "a"}').job_id == "a"
    with pytest.raises(WorkerError, match="given more than once"):
        parse(CancelRequest, b'{"job_id": "a", "job_id": "a"}')
