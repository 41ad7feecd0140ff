"""The draw against a plain reading of its definition, the distribution it gives, and its edge cases."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from refengine.engine.philox import random_bits
from refengine.engine.sampling import SamplingParams, draw, logprobs, sample
from refengine.errors import RefengineError, RequestError

examples = settings(max_examples=300, deadline=None)  # no deadline: a busy machine is no failure

Candidates = list[tuple[int, float]]

MARGIN = 1e-9  # the naive reading sums rounded probabilities; nearer than this to a boundary it may err


def naive_candidates(
    logits: Sequence[float] | np.ndarray, params: SamplingParams, history: Sequence[int]
) -> Candidates | None:
    """[(id, probability)] in draw order, in the order of W-1300; Python floats, one full sort.

    None where a boundary is nearer than MARGIN.
    """
    scaled = [float(x) / params.temperature for x in logits]
    for token_id in set(history):
        x = scaled[token_id]
        scaled[token_id] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = order[: params.top_k] if params.top_k else order
    expd = [math.exp(scaled[i] - scaled[order[0]]) for i in kept]
    probs = [e / sum(expd) for e in expd]

    n_top_p = len(kept)
    if params.top_p < 1:
        sums = np.cumsum(probs)
        if min(abs(sums - params.top_p)) < MARGIN:
            return None
        n_top_p = 1 + sum(bool(s < params.top_p) for s in sums[:-1])
    ratios = [p / probs[0] for p in probs[:n_top_p]]
    if any(abs(r - params.min_p) < MARGIN and r != 1.0 for r in ratios):
        return None
    final = [i for i, r in zip(kept, ratios, strict=False) if r >= params.min_p]
    total = sum(probs[: len(final)])
    return [(i, p / total) for i, p in zip(final, probs, strict=False)]


def naive_draw(candidates: Candidates, u: float) -> int | None:
    """The id at u by inverse CDF; None where u is nearer than MARGIN to a boundary."""
    running = 0.0
    for token_id, prob in candidates:
        running += prob
        if abs(running - u) < MARGIN:
            return None
        if running > u:
            return token_id
    return None


# Quarters: many ties, and exact under the powers of two among temperatures and penalties.
logit_lists = st.lists(st.integers(-16, 16).map(lambda n: n / 4), min_size=1, max_size=12)
all_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 7, 20]),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
)


@examples
@given(logits=logit_lists, params=all_params, bits=st.integers(0, 2**64 - 1), data=st.data())
def test_draw_equals_the_naive_reading(
    logits: list[float], params: SamplingParams, bits: int, data: st.DataObject
) -> None:
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    candidates = naive_candidates(logits, params, history)
    if candidates is None:
        reject()
    expected = naive_draw(candidates, bits / 2**64)
    assume(expected is not None)
    assert draw(np.array(logits, np.float32), params, history, bits) == expected


@examples
@given(logits=logit_lists, params=all_params, data=st.data())
def test_draw_keeps_the_naive_candidates_and_no_more(
    logits: list[float], params: SamplingParams, data: st.DataObject
) -> None:
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    candidates = naive_candidates(logits, params, history)
    if candidates is None:
        reject()
    sums = [0.0, *np.cumsum([p for _, p in candidates])]
    middles = [(low + high) / 2 for low, high in pairwise(sums)]
    row = np.array(logits, np.float32)
    assert [draw(row, params, history, int(u * 2**64)) for u in middles] == [i for i, _ in candidates]
    assert draw(row, params, history, 0) == candidates[0][0]
    assert draw(row, params, history, 2**64 - 1) == candidates[-1][0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=777),
        SamplingParams(top_p=0.97),
        SamplingParams(min_p=0.02),
        SamplingParams(top_k=3000, top_p=0.8, min_p=0.001, repetition_penalty=1.25),
    ],
)
def test_draw_of_a_long_row_equals_the_naive_reading(params: SamplingParams) -> None:
    # Rounded to quarters: long runs of ties; flat enough that a draw ranks far beyond its first partial sort.
    rng = np.random.default_rng(3)
    logits = (np.round(4 * rng.standard_normal(5003)) / 4).astype(np.float32)
    history = [17, 17, 4000, 5]
    candidates = naive_candidates(logits, params, history)
    assert candidates is not None
    expected = [naive_draw(candidates, u) for u in np.linspace(0.0, 0.999, 41)]
    drawn = [draw(logits, params, history, int(u * 2**64)) for u in np.linspace(0.0, 0.999, 41)]
    assert [d for d, e in zip(drawn, expected, strict=True) if e is not None] == [e for e in expected if e is not None]
    assert sum(e is not None for e in expected) >= 40
    assert len(set(drawn)) > 30


def test_draw_boundaries_are_exact() -> None:
    # Two equal tokens: the lower id has exactly the lower half of the 2**64 values, of whatever is kept.
    for params in (SamplingParams(), SamplingParams(top_k=2), SamplingParams(min_p=1.0), SamplingParams(top_p=0.75)):
        logits = np.array([0.5, -1e4, 0.5], np.float32)
        assert [draw(logits, params, [], bits) for bits in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 0, 2, 2]
    # top_p equal to a running sum keeps no token more.
    assert draw(np.zeros(4, np.float32), SamplingParams(top_p=0.5), [], 2**64 - 1) == 1


CHI_SQUARE_LOGITS = np.array([1.5, -2.0, 0.25, 3.0, 3.0, -0.5, 1.0], np.float32)
CHI_SQUARE_LIMIT = 22.46  # 99.9 % quantile for 6 degrees of freedom


def chi_square(ids: list[int], temperature: float) -> float:
    x = CHI_SQUARE_LOGITS.astype(np.float64) / temperature
    expected = np.exp(x) / np.exp(x).sum() * len(ids)
    counts = np.bincount(ids, minlength=x.size)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_is_distributed_as_softmax_over_indexes_and_over_seeds(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    over_indexes = [sample(CHI_SQUARE_LOGITS, params, [], 42, index) for index in range(5000)]
    over_seeds = [sample(CHI_SQUARE_LOGITS, params, [], seed, 7) for seed in range(5000)]
    assert chi_square(over_indexes, temperature) < CHI_SQUARE_LIMIT
    assert chi_square(over_seeds, temperature) < CHI_SQUARE_LIMIT
    # Control: the test can tell a temperature that is 10 % off.
    assert chi_square(over_indexes, 1.1 * temperature) > CHI_SQUARE_LIMIT


def test_sample_is_pinned() -> None:
    # Seeded answers may not change between releases: these ids follow from the documented definition.
    logits = np.array([0.0, 1.0, 2.0, 1.0, 0.5], np.float32)
    ids = [sample(logits, SamplingParams(), [], 2024, index) for index in range(12)]
    candidates = naive_candidates(logits, SamplingParams(), [])
    assert candidates is not None
    assert ids == [naive_draw(candidates, random_bits(2024, index) / 2**64) for index in range(12)]
    assert ids == [2, 2, 2, 1, 2, 1, 2, 3, 2, 1, 0, 3]


def test_sample_reads_nothing_but_its_arguments() -> None:
    logits = np.linspace(-3, 3, 61, dtype=np.float32)
    before = logits.copy()
    params = SamplingParams(top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    history = np.array([60, 59, 0])
    forwards = [sample(logits, params, history, 9, index) for index in range(50)]
    backwards = [sample(logits, params, history, 9, index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 5
    assert [sample(logits, params, history, 10, index) for index in range(50)] != forwards
    np.testing.assert_array_equal(logits, before)


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    # W-1032
    logits = np.array([1.0, 3.0, 2.0, 3.0, 3.0], np.float32)
    assert [sample(logits, SamplingParams(temperature=0), [], 5, index) for index in range(8)] == [1] * 8


def test_greedy_applies_the_repetition_penalty() -> None:
    logits = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    assert draw(logits, SamplingParams(temperature=0, repetition_penalty=1.4), [1], 0) == 1  # 3 / 1.4 > 2
    assert draw(logits, SamplingParams(temperature=0, repetition_penalty=1.6), [1], 0) == 2
    assert draw(logits, SamplingParams(temperature=0, repetition_penalty=1.6), [1, 2, 2, 2], 0) == 1  # once each
    negative = np.array([-1.0, -1.5], np.float32)
    assert draw(negative, SamplingParams(temperature=0, repetition_penalty=1.4), [0], 0) == 0  # -1.4
    assert draw(negative, SamplingParams(temperature=0, repetition_penalty=1.6), [0], 0) == 1  # -1.6


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=0.0), SamplingParams(min_p=1.0)])
def test_tightest_filters_keep_the_likeliest_token(params: SamplingParams) -> None:
    logits = np.array([0.0, 2.0, 1.5, 2.5], np.float32)
    assert {draw(logits, params, [], bits) for bits in (0, 2**63, 2**64 - 1)} == {3}


def test_top_k_cuts_ties_at_the_lowest_ids() -> None:
    logits = np.full(1000, 0.5, np.float32)
    logits[700] = 1.0
    params = SamplingParams(top_k=4)
    assert {draw(logits, params, [], k << 56) for k in range(256)} == {700, 0, 1, 2}


def test_min_p_keeps_all_tokens_as_likely_as_the_likeliest() -> None:
    logits = np.array([2.0, 1.0, 2.0, 2.0], np.float32)
    assert {draw(logits, SamplingParams(min_p=1.0), [], k << 56) for k in range(256)} == {0, 2, 3}


def test_top_k_of_the_vocabulary_or_more_is_off() -> None:
    logits = np.array([0.0, 2.0, 1.5], np.float32)
    off = [draw(logits, SamplingParams(), [], k << 58) for k in range(64)]
    for top_k in (3, 4, 10**6):
        assert [draw(logits, SamplingParams(top_k=top_k), [], k << 58) for k in range(64)] == off


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-320),
        SamplingParams(repetition_penalty=1e-320, temperature=1e-320),
        SamplingParams(repetition_penalty=1e-320, top_p=0.5),
    ],
)
@pytest.mark.filterwarnings("error")
def test_smallest_temperature_and_penalty_take_the_largest_logit(params: SamplingParams) -> None:
    logits = np.array([-(2.0**127), 1.0, 2.0**127, -1.0], np.float32)
    assert draw(logits, params, [2], 2**64 - 1) == 2


@pytest.mark.filterwarnings("error")
def test_masked_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0], np.float32)
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(repetition_penalty=1.5, top_p=0.999)):
        assert {draw(logits, params, [0], bits) for bits in (0, 2**62, 2**64 - 1)} == {1, 3}


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0)])
@pytest.mark.parametrize(("bad", "said"), [(np.nan, r"logits\[2\] is NaN"), (np.inf, r"logits\[2\] is \+Inf")])
def test_unusable_logits_are_named(params: SamplingParams, bad: float, said: str) -> None:
    logits = np.array([0.0, 1.0, bad, bad], np.float32)
    with pytest.raises(RefengineError, match=said):
        draw(logits, params, [], 0)
    with pytest.raises(RefengineError, match=said):
        logprobs(logits, 0, 1)


def test_rows_without_a_token_are_refused() -> None:
    with pytest.raises(RefengineError, match="all 3 logits are -Inf"):
        draw(np.full(3, -np.inf, np.float32), SamplingParams(), [], 0)
    with pytest.raises(RefengineError, match=r"given shape \(2, 3\), expected \(n_vocab,\)"):
        draw(np.zeros((2, 3), np.float32), SamplingParams(), [], 0)


@pytest.mark.parametrize("token_id", [-1, 4])
def test_history_beyond_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match=f"history: given token id {token_id}, allowed 0 to 3"):
        draw(np.zeros(4, np.float32), SamplingParams(repetition_penalty=1.1), [0, token_id], 0)


@examples
@given(logits=logit_lists, n_top=st.integers(0, 20), data=st.data())
def test_logprobs_equal_log_softmax_in_rank_order(logits: list[float], n_top: int, data: st.DataObject) -> None:
    token_id = data.draw(st.integers(0, len(logits) - 1))
    log_total = math.log(math.fsum(math.exp(x) for x in logits))
    chosen, top = logprobs(np.array(logits, np.float32), token_id, n_top)
    assert chosen == pytest.approx(logits[token_id] - log_total, abs=1e-12)  # logits up to 4: rounding is 1e-15
    assert [i for i, _ in top] == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:n_top]
    assert [value for _, value in top] == pytest.approx([logits[i] - log_total for i, _ in top], abs=1e-12)


def test_logprobs_refuse_ids_and_counts_out_of_range() -> None:
    with pytest.raises(RequestError, match="token_id: given 3, allowed an integer from 0 to 2"):
        logprobs(np.zeros(3, np.float32), 3, 1)
    with pytest.raises(RequestError, match="n_top: given -1"):
        logprobs(np.zeros(3, np.float32), 0, -1)
