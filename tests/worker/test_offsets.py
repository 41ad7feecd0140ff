"""`text_offset` of completions: where in the text of its choice each token's own text begins."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.cli_runner import write_llama
from tests.worker.server import HAIKU, Server, serving

SAID = "the warp hums, 雨 falls"


@pytest.fixture(scope="module")
def haiku() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A vocabulary with a BOS and with spaces in front of texts."""
    with serving("--model", write_llama(tmp_path_factory.mktemp("llama"))) as running:
        yield running


def choice_of(server: Server, **body: Any) -> dict[str, Any]:
    """Whole; what streams has the same offsets."""
    body = {"max_tokens": 30, "logprobs": 0, "seed": 1, **body}
    with server.client() as client:
        (whole,) = client.post("/v1/completions", json=body).json()["choices"]
        lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for part in parts if part for offset in part["text_offset"]] == whole["logprobs"]["text_offset"]
    return whole


def pieces(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """Each token, and what of the text is its own."""
    found = choice["logprobs"]
    ends = pairwise([*found["text_offset"], len(choice["text"])])
    return [(token, choice["text"][a:b]) for token, (a, b) in zip(found["tokens"], ends, strict=True)]


def test_text_that_is_held_back_for_a_stop_string_is_its_own_tokens(haiku: Server) -> None:
    free = choice_of(haiku, **HAIKU)
    held = choice_of(haiku, **HAIKU, stop=[free["text"][8:18] + "ZZZ", free["text"][40:44] + "ZZZ"])
    assert held == free
    assert all(piece == token for token, piece in pieces(held)[:-1])  # the last ends the turn


@pytest.mark.parametrize("stop", [[], ["e", " "], ["qZ", " aZ", "\ufffdZ"]])
def test_spaces_in_front_are_where_they_are(llama: Server, stop: list[str]) -> None:
    choice = choice_of(llama, prompt=SAID, stop=stop)
    expected = choice_of(llama, prompt=SAID)
    n = len(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["text_offset"] == expected["logprobs"]["text_offset"][:n]
    for token, piece in pieces(expected):
        assert piece == token or token.startswith("bytes:")


def test_bos_that_is_not_in_the_text_has_no_width(llama: Server) -> None:
    (bos, nothing), (the, first), *rest = pieces(choice_of(llama, prompt=SAID, echo=True))
    assert (bos, nothing, the, first) == ("<s>", "", " the", "the")
    for token, piece in rest:
        assert piece == token or token.startswith("bytes:")


def test_bos_that_is_in_the_text_has_its_width(llama: Server) -> None:
    with llama.client() as client:
        ids = client.post("/tokenize", json={"content": SAID}).json()["tokens"]
    for prompt, n_bos in ((ids, 1), ("<s>" + SAID, 0)):
        choice = choice_of(llama, prompt=prompt, echo=True)
        assert choice["text"].startswith("<s>" + SAID)
        found = pieces(choice)
        assert found[0] == ("<s>", "<s>"[: 3 * n_bos])
        assert "".join(piece for _, piece in found) == choice["text"]
