"""Generation: every way it can end, its cache, its text."""

import pytest

import refengine
from refengine.engine.generation import Generation
from refengine.engine.sampling import SamplingParams
from refengine.errors import RequestError, TraceError
from refengine.trace import Trace, no_trace

GREEDY = SamplingParams(temperature=0, max_tokens=10)


@pytest.fixture
def model(tiny_model):
    return refengine.load(tiny_model("llama-q8_0"), n_ctx=100)


def test_length_ends_after_max_tokens(model):
    tokens = list(model.generate([1, 5, 9], GREEDY))
    assert len(tokens) == 10
    assert [t.stop_reason for t in tokens] == [None] * 9 + ["length"]


def test_the_context_ends_it_too(model):
    tokens = list(model.generate([1] * 95, GREEDY))
    assert len(tokens) == 5
    assert tokens[-1].stop_reason == "length"
    with pytest.raises(RequestError, match="no room"):
        Generation(model, [1] * 100, GREEDY)


def test_learned_positions_bound_the_context(tiny_model):
    with pytest.raises(RequestError, match="positions"):
        refengine.load(tiny_model("gpt2-q8_0"), n_ctx=10**6)


def test_an_end_of_generation_token_ends_it(model):
    ids = [t.id for t in model.generate([1, 5, 9], GREEDY)]
    position = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 2)
    model.tokenizer.eog_ids = frozenset({ids[position]})
    tokens = list(model.generate([1, 5, 9], GREEDY))
    assert [t.id for t in tokens] == ids[: position + 1]
    assert (tokens[-1].stop_reason, tokens[-1].text) == ("eos", "")


def test_a_stop_string_is_cut_out_across_tokens(model):
    text = "".join(t.text for t in model.generate([1, 5, 9], GREEDY))
    stop = text[4:9]
    cut = list(model.generate([1, 5, 9], SamplingParams(temperature=0, max_tokens=10, stop=(stop,))))
    assert "".join(t.text for t in cut) == text[: text.index(stop)]
    assert cut[-1].stop_reason == "stop"


def test_text_equals_decoded_ids(model):
    tokens = list(model.generate([1, 5, 9], SamplingParams(seed=3, max_tokens=40)))
    ids = [t.id for t in tokens if t.stop_reason != "eos"]
    stream = model.tokenizer.stream(skip_special=True, prompt_ids=[1, 5, 9])
    assert "".join(t.text for t in tokens) == "".join(map(stream.push, ids)) + stream.finish()


def test_free_returns_the_blocks_and_may_be_repeated(model):
    generation = Generation(model, [1, 5, 9], GREEDY)
    pool = generation._cache.pool
    before = pool.n_free
    generation.next_token()
    assert pool.n_free < before
    generation.free()
    generation.free()
    assert pool.n_free == before == pool.n_blocks


def test_a_stop_string_without_vocabulary_is_refused(tiny_model):
    model = refengine.load(tiny_model("llama-f32-no-vocab"))
    with pytest.raises(RequestError, match="vocabulary"):
        list(model.generate([3], SamplingParams(stop=("x",))))


def test_trace_watch_names_the_first_bad_tensor(model):
    model.weights.layers[1].ffn_norm = model.weights.layers[1].ffn_norm.copy()
    model.weights.layers[1].ffn_norm[3] = float("nan")
    with pytest.raises(TraceError, match=r"ffn_norm-1 .*nan at \(0, 3\)"):
        model.forward([1, 5, 9], trace=Trace(watch=True))


def test_trace_replace_takes_effect_and_checks_the_shape(model):
    reference = model.forward([1, 5, 9])
    trace = Trace(replace={"l_out-0": lambda x: x * 2})
    assert abs(model.forward([1, 5, 9], trace=trace) - reference).max() > 0
    with pytest.raises(TraceError, match="l_out-0"):
        model.forward([1, 5, 9], trace=Trace(replace={"l_out-0": reference}))


def test_trace_reports_names_that_do_not_occur(model):
    trace = Trace(breakpoints=["Qcur-9"], on_break=lambda name, x: None)
    model.forward([1], trace=trace)
    with pytest.raises(TraceError, match="Qcur-9"):
        trace.check_names()


def test_trace_joins_the_rows_of_chunks(model):
    whole, parts = Trace("^l_out-2$"), Trace("^l_out-2$")
    model.forward([1, 5, 9, 2, 4], trace=whole)
    model.forward([1, 5, 9, 2, 4], trace=parts, chunk=2)
    assert parts.result()["l_out-2"].shape == whole.result()["l_out-2"].shape == (5, 96)


def test_no_trace_returns_the_same_object():
    x = object()
    assert no_trace("Qcur", 0, x) is x
