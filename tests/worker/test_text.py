"""Text that comes byte by byte: a worker whose model says a given text, each byte of its UTF-8 a token of its own."""

from collections.abc import Iterator

import pytest

from tests.cli_runner import write_qwen2
from tests.worker.server import SCRIPTED, Server, serving, text_of

SAID = "雨のち晴れ 🌧️→☀️ naïve Ελλάδα 👩‍🚀 עברית "


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_qwen2(tmp_path_factory.mktemp("text"))
    with serving("--model", model, script=(SCRIPTED, SAID)) as running:
        yield running


def test_no_code_point_is_ever_cut(server: Server) -> None:
    n_bytes = len(SAID.encode())
    events = server.run(prompt="x", temperature=0, max_tokens=n_bytes)
    assert text_of(events) == SAID
    assert events[-1][1]["tokens_out"] == n_bytes
    pieces = [data["t"] for name, data in events if name == "token"]
    assert len(pieces) == n_bytes
    assert set(pieces) == {"", *SAID}  # a byte that completes nothing sends nothing


def test_an_answer_that_ends_inside_a_code_point(server: Server) -> None:
    """Only then is there a U+FFFD, for what the model did not complete."""
    events = server.run(prompt="x", temperature=0, max_tokens=4)
    assert text_of(events) == "雨�"


@pytest.mark.parametrize("stop", ["晴れ", "☀", "Ελλάδα", "🚀 ע"])
def test_stop_strings_of_many_bytes(server: Server, stop: str) -> None:
    events = server.run(prompt="x", temperature=0, max_tokens=200, stop=[stop])
    assert text_of(events) == SAID[: SAID.index(stop)]
    assert events[-1][1]["stop_reason"] == "stop"


def test_texts_with_ids_say_the_same(server: Server) -> None:
    events = server.run(prompt="x", temperature=0, max_tokens=60, logprobs=2)
    ids = [data["id"] for name, data in events if name == "token"]
    assert bytes(ids) == SAID.encode()[:60]
    assert text_of(events) == bytes(ids).decode(errors="replace")
