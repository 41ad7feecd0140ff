"""Sampling on the device draws the tokens that `engine.sampling` draws."""

from typing import Any

import numpy as np
import pytest

from refengine.cuda.kernels.sampling import Sampler, allocated
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.sampling import checked_tokens, sample_rows
from refengine.engine.sampling import SamplingParams, sample
from refengine.errors import KernelError, RefengineError
from refengine.trace import to_numpy
from tests.kernels.op_twins import OpsThere


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


def drawn(
    there: OpsThere, logits: np.ndarray, params: Any, histories: Any = None, seeds: Any = None, indices: Any = None
) -> list[int]:
    n = len(logits)
    given = (histories or [[]] * n, seeds or [7] * n, indices or list(range(n)))
    out = to_numpy(sample_rows(there.xp, there.ops.kernels, there.put(logits), params, *given))
    np.testing.assert_array_equal(stepped(there, logits, params, *given), out)
    return checked_tokens(out)


def stepped(
    there: OpsThere, logits: np.ndarray, params: Any, histories: Any, seeds: Any, indices: Any, absent: int = 2
) -> np.ndarray:
    """What a decode step draws. It leaves the state of its rows ready for the next token, and other rows alone."""
    n, n_vocab = logits.shape
    longest = max(map(len, histories)) + 1
    sampler = Sampler(there.ops.kernels, n_vocab, longest)
    b = allocated(sampler, n + absent, there.xp.zeros, {})
    before = {name: to_numpy(b[name]).copy() for name in ("reals", "whole", "history", "ids", "positions", "drawn")}
    before["positions"][:] = [*range(n), *[-1] * absent]
    for i, (p, ids, seed, index) in enumerate(zip(params, histories, seeds, indices, strict=True)):
        before["reals"][i] = p.temperature, p.top_p, p.min_p, p.repetition_penalty
        n_history = len(ids) if p.repetition_penalty != 1.0 else 0
        before["whole"][i] = np.array([p.top_k, seed, index, n_history], np.uint64).view(np.int64)
        before["history"][i, :n_history] = ids[:n_history]
    for name, values in before.items():
        b[name][...] = there.put(values)
    padded = np.concatenate([logits, np.full((absent, n_vocab), np.nan, np.float32)])
    sampler.draw(n + absent, there.put(padded), b)
    after = {name: to_numpy(b[name]) for name in before}
    for name in before:
        np.testing.assert_array_equal(after[name][n:], before[name][n:])
    drawn = after["drawn"][:n]
    np.testing.assert_array_equal(after["ids"][:n], np.maximum(drawn[:, 0], 0))
    np.testing.assert_array_equal(after["positions"][:n], np.arange(1, n + 1))
    np.testing.assert_array_equal(after["whole"][:n, :3], before["whole"][:n, :3] + [0, 0, 1])
    for i, p in enumerate(params):
        length = int(before["whole"][i, 3])
        assert after["whole"][i, 3] == length + (p.repetition_penalty != 1.0)
        if p.repetition_penalty != 1.0:
            assert after["history"][i, length] == max(drawn[i, 0], 0)
    return drawn


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.5},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "temperature": 0.8},
    {"repetition_penalty": 0.5, "top_p": 0.7},
    {"temperature": 1e-3, "top_k": 30},
]


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
@pytest.mark.parametrize("kind", ["normal", "ties", "masked"])
def test_tokens_are_those_of_the_host(setting: int, kind: str, there: OpsThere) -> None:
    rng = np.random.default_rng(setting)
    n_rows, n_vocab = 12, 333
    logits = (rng.standard_normal((n_rows, n_vocab)) * 3).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
        logits[:, 5] = -0.0
    if kind == "masked":
        logits[:, rng.permutation(n_vocab)[:320]] = -np.inf
    params = SamplingParams(**SETTINGS[setting])
    histories = [rng.integers(0, n_vocab, rng.integers(0, 50)).tolist() for _ in range(n_rows)]
    seeds = [int(s) for s in rng.integers(0, 1 << 64, n_rows, dtype=np.uint64)]
    indices = [int(i) for i in rng.integers(0, 1 << 40, n_rows)]
    expected = [sample(*given) for given in zip(logits, [params] * n_rows, histories, seeds, indices, strict=True)]
    assert drawn(there, logits, [params] * n_rows, histories, seeds, indices) == expected


@pytest.mark.parametrize("kind", ["flat", "two values", "close"])
def test_many_candidates_of_nearly_one_weight(kind: str, there: OpsThere) -> None:
    """More than draw_f32 lists: bins are searched as a row is."""
    rng = np.random.default_rng(5)
    n_vocab = 1300
    logits = np.zeros((len(SETTINGS), n_vocab), np.float32)
    if kind == "two values":
        logits[:, rng.permutation(n_vocab)[:600]] = -40.0
    if kind == "close":
        logits += rng.integers(0, 5, logits.shape).astype(np.float32) * np.float32(1e-3)
    params = [SamplingParams(**s) for s in SETTINGS]
    histories = [rng.integers(0, n_vocab, 30).tolist() for _ in params]
    indices = list(range(len(params)))
    expected = [sample(*given) for given in zip(logits, params, histories, indices, indices, strict=True)]
    assert drawn(there, logits, params, histories, indices, indices) == expected
    top = [SamplingParams(top_k=int(k)) for k in rng.integers(1, n_vocab + 1, len(params))]
    expected = [sample(*given) for given in zip(logits, top, histories, indices, indices, strict=True)]
    assert drawn(there, logits, top, histories, indices, indices) == expected


def test_rows_have_settings_of_their_own_and_do_not_know_each_other(there: OpsThere) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((len(SETTINGS), 100)).astype(np.float32)
    params = [SamplingParams(**s) for s in SETTINGS]
    histories = [[3, 3, 99, 0]] * len(params)
    together = drawn(there, logits, params, histories)
    for i, one in enumerate(params):
        assert drawn(there, logits[i : i + 1], [one], histories[:1], [7], [i]) == together[i : i + 1]


def test_a_large_vocabulary_and_a_long_history(there: OpsThere) -> None:
    """Each thread has more than one round of loads; bins have hundreds of candidates, of which some are listed."""
    rng = np.random.default_rng(8)
    n_vocab = 7001
    logits = (rng.standard_normal((len(SETTINGS), n_vocab)) * 0.3).astype(np.float32)
    params = [SamplingParams(**s) for s in SETTINGS]
    histories = [rng.integers(0, n_vocab, 700).tolist() for _ in params]
    indices = list(range(len(params)))
    expected = [sample(*given) for given in zip(logits, params, histories, indices, indices, strict=True)]
    assert drawn(there, logits, params, histories, indices, indices) == expected


class Turned(Kernels):
    """Launches with the threads of a block in another order."""

    def __init__(self, order: int) -> None:
        super().__init__("host", "checked")
        self._order = order

    def launch(self, file: str, kernel: str, grid: Any, block: int, arguments: Any, *_: Any, **__: Any) -> None:
        self.module(file).launch(kernel, grid, (block,), arguments, order=self._order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(order: int, place: str) -> None:
    if place == "cuda":
        pytest.skip("threads run in an order of their own there")
    rng = np.random.default_rng(order)
    logits = np.round(rng.standard_normal((len(SETTINGS), 500)) * 4).astype(np.float32)
    params = [SamplingParams(**s) for s in SETTINGS]
    histories = [rng.integers(0, 500, 90).tolist() for _ in params]
    indices = list(range(len(params)))
    expected = [sample(*given) for given in zip(logits, params, histories, indices, indices, strict=True)]
    assert checked_tokens(sample_rows(np, Turned(order), logits, params, histories, indices, indices)) == expected


def test_draws_follow_the_distribution(there: OpsThere) -> None:
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), (400, 1))
    tokens = drawn(there, logits, [SamplingParams()] * 400, indices=list(range(400)))
    counts = np.bincount(tokens, minlength=4)
    expected = 400 * np.array([0.5, 0.3, 0.15, 0.05])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square of three degrees, one in a thousand


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"logits\[17\] is NaN"),
        (np.inf, r"logits\[17\] is \+Inf"),
        (-np.inf, "all logits are -Inf"),
    ],
)
def test_unusable_logits_are_named(value: float, message: str, there: OpsThere) -> None:
    logits = np.zeros((3, 40), np.float32)
    logits[1, 17 if value != -np.inf else slice(None)] = value
    logits[1, 30:] = value
    with pytest.raises(RefengineError, match=f"row 1: {message}"):
        drawn(there, logits, [SamplingParams()] * 3)


def test_ids_outside_the_vocabulary_are_refused(there: OpsThere) -> None:
    with pytest.raises(KernelError, match="ids 40 to 40 in a history, allowed 0 to 39"):
        drawn(there, np.zeros((1, 40), np.float32), [SamplingParams(repetition_penalty=1.1)], [[40]])
