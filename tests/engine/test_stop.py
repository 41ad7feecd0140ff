"""Stop strings over arbitrary chunks, against the definition on the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.engine.stop import StopMatcher
from refengine.errors import RequestError
from tests.levels import in_ci

examples = settings(max_examples=in_ci(500, 150), deadline=None)  # no deadline: a busy machine is no failure

# Few letters, so that stop strings overlap themselves, each other and the chunks' ends.
texts = st.text(alphabet="abé", max_size=12)
stop_lists = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4)


def naive_cut(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the first match to complete, the longest there; None without one."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None


def run(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    emitted = "".join(matcher.push(chunk)[0] for chunk in chunks)
    stopped = matcher.stopped
    return emitted + matcher.finish(), stopped


@examples
@given(stops=stop_lists, chunks=st.lists(texts, max_size=8))
def test_stop_equals_the_definition_under_any_chunking(stops: list[str], chunks: list[str]) -> None:
    text = "".join(chunks)
    cut = naive_cut(text, stops)
    assert run(stops, chunks) == (text if cut is None else text[: cut[0]], cut is not None)


@examples
@given(stops=stop_lists, chunks=st.lists(texts, max_size=8))
def test_stop_is_told_by_the_chunk_that_completes_it(stops: list[str], chunks: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = ""
    for chunk in chunks:
        seen += chunk
        _, stopped = matcher.push(chunk)
        assert stopped == (naive_cut(seen, stops) is not None)


@examples
@given(stops=stop_lists, chunks=st.lists(texts, max_size=8))
def test_stop_holds_back_only_what_could_become_one(stops: list[str], chunks: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = ""
    n_emitted = 0
    for chunk in chunks:
        seen += chunk
        emitted, stopped = matcher.push(chunk)
        n_emitted += len(emitted)
        if stopped:
            break
        proper_prefixes = [stop[:n] for stop in stops for n in range(len(stop))]
        assert len(seen) - n_emitted == max((len(p) for p in proper_prefixes if seen.endswith(p)), default=0)


def test_stop_across_token_boundaries() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    pushes = [matcher.push(piece) for piece in ["Hi.", "\n", "\nUs", "ers", " \n", "\nUser", ": and more"]]
    assert pushes == [
        ("Hi.", False),
        ("", False),
        ("", False),
        ("\n\nUsers", False),
        (" ", False),
        ("", False),
        ("", True),
    ]
    assert matcher.push("x") == ("", True)
    assert matcher.finish() == ""


def test_stop_that_completes_first_wins_over_one_that_starts_first() -> None:
    # "c" is complete before anybody can know whether "abcd" will be.
    assert run(["abcd", "c"], ["xabcd"]) == ("xab", True)
    assert run(["abcd", "c"], list("xabcd")) == ("xab", True)
    assert run(["d", "abcd"], ["xabcd"]) == ("x", True)


def test_finish_returns_the_held_text() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


def test_no_stops_hold_back_nothing() -> None:
    matcher = StopMatcher([])
    assert matcher.push("any") == ("any", False)
    assert matcher.finish() == ""


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop: given"):
        StopMatcher(["a", ""])
