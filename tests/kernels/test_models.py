"""Whole models on the kernels: near `exact`, nearer than llama.cpp is, and bit for bit the same however they are fed.

test_llamacpp.py compares them with llama.cpp.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import refengine
from refengine.cache.paged import CacheSequence, KVCache
from refengine.errors import DeviceError, RequestError
from refengine.model import Model
from refengine.trace import Trace, to_numpy
from refengine.validate.metrics import nmse
from tests.levels import ci_only, mostly_in_ci
from tests.model_files import ModelFiles
from tools.make_model import ONE_EACH, TINY
from tools.model_specs import PURE

N_TOKENS = 70


def loaded(path: Any, place: str) -> Model:
    try:
        return refengine.load(path, "host" if place == "host" else "cuda", "fast")
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")


def ids_for(model: Model, n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.n_vocab, n).tolist()


DAILY = {*ONE_EACH.values(), *(f"llama-{kind.lower()}" for kind in PURE)}  # every architecture and every type


@pytest.mark.parametrize("name", ci_only(TINY, TINY.keys() - DAILY))
def test_logits_are_those_of_the_array_twin(name: str, place: str, tiny_model: ModelFiles) -> None:
    """Against `exact` the kernels and their NumPy twin, which rounds alike, are equally far."""
    path = tiny_model(name)
    ids = ids_for(exact := refengine.load(path), 24)
    oracle = exact.forward(ids)
    error = nmse(loaded(path, place).forward(ids), oracle)
    twin = nmse(refengine.load(path, numerics="fast").forward(ids), oracle)
    # Of random roundings of 2^-11 over three layers: the largest seen is 1e-6 (qwen2-q4_k_m). How far the same
    # roundings come out apart in two orders of sums was at most a factor of 2.
    assert error <= 4 * twin + 1e-12
    assert error < 1e-5


class Fed:
    """A model and a cache whose blocks come in a given order."""

    def __init__(self, model: Model, n_tokens: int, n_sequences: int, shuffle: int | None = None) -> None:
        self.model = model
        self.cache: KVCache = model.new_cache(n_tokens, n_sequences + 1)
        if shuffle is not None:
            take = iter(np.random.default_rng(shuffle).permutation(self.cache.pool.n_blocks).tolist())
            self.cache.pool.allocate = lambda n: [next(take) for _ in range(n)]  # type: ignore[method-assign]

    def feed(self, parts: Sequence[tuple[CacheSequence, Sequence[int]]]) -> list[np.ndarray]:
        """Logits of each part."""
        logits = to_numpy(self.model.step(parts, self.cache))
        ends = np.cumsum([len(ids) for _, ids in parts])
        return np.split(logits, ends[:-1])


def cuts(n: int, size: int | np.random.Generator) -> list[slice]:
    """0 … n in parts of a size, or of random sizes."""
    parts, start = [], 0
    while start < n:
        step = int(size.integers(1, 20)) if isinstance(size, np.random.Generator) else size
        parts.append(slice(start, min(start + step, n)))
        start += step
    return parts


@pytest.fixture(scope="module", params=mostly_in_ci(ONE_EACH))
def model(request: pytest.FixtureRequest, place: str, tiny_model: ModelFiles) -> Model:
    return loaded(tiny_model(request.param), place)


@pytest.fixture(scope="module")
def expected(model: Model) -> np.ndarray:
    return model.forward(ids_for(model, N_TOKENS))


def test_three_runs_give_the_same_bits(model: Model, expected: np.ndarray) -> None:
    for _ in range(2):
        np.testing.assert_array_equal(model.forward(ids_for(model, N_TOKENS)), expected)


@pytest.mark.parametrize("size", [1, 7, 64, "random"])
def test_chunks_give_the_same_bits(size: Any, model: Model, expected: np.ndarray) -> None:
    ids = ids_for(model, N_TOKENS)
    fed, sequence = Fed(model, N_TOKENS, 1), CacheSequence()
    parts = cuts(N_TOKENS, np.random.default_rng(2) if size == "random" else size)
    logits = [fed.feed([(sequence, ids[part])])[0] for part in parts]
    np.testing.assert_array_equal(np.concatenate(logits), expected)


@pytest.mark.parametrize("n", [2, 3, 8, 17])
def test_a_row_does_not_know_its_neighbours(n: int, model: Model, expected: np.ndarray) -> None:
    """Beside other sequences of other lengths, in shuffled blocks; the last two tokens one by one, in a batch of n."""
    rng = np.random.default_rng(n)
    ids = ids_for(model, N_TOKENS)
    fed = Fed(model, N_TOKENS, n, shuffle=n)
    mine, at = CacheSequence(), int(rng.integers(n))
    others = [(CacheSequence(), ids_for(model, int(rng.integers(1, 40)), seed=100 + i)) for i in range(n - 1)]
    prompts = [(s, o[: max(1, len(o) - 2)]) for s, o in others]
    prompts.insert(at, (mine, ids[: N_TOKENS - 2]))
    got = [fed.feed(prompts)[at]]
    for step in range(2):
        tokens = [(s, [o[-1] + step]) for s, o in others]
        tokens.insert(at, (mine, ids[N_TOKENS - 2 + step : N_TOKENS - 1 + step]))
        got.append(fed.feed(tokens)[at])
    np.testing.assert_array_equal(np.concatenate(got), expected)


def test_an_order_of_sums_that_depends_on_the_batch_is_caught(model: Model, expected: np.ndarray) -> None:
    """The control: products whose order depends on the number of rows fail the comparison that the others pass."""

    class Careless:
        def __init__(self, ops: Any) -> None:
            self.ops = ops

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ops, name)

        def linear(self, x: Any, w: Any, bias: Any = None) -> Any:
            y = self.ops.linear(x, w)
            if x.shape[0] > 8:  # as a kernel that splits K for few rows and not for many: half of K after the other
                half = x.shape[1] // 64 * 32
                first, second = x.copy(), x.copy()
                first[:, half:] = 0
                second[:, :half] = 0
                y = self.ops.linear(second, w) + self.ops.linear(first, w)
            return y if bias is None else y + bias

    careless = Model(
        model.gguf, model.config, model.vocabulary, model.weights, Careless(model.ops), model.device, model.n_ctx
    )
    n = 20
    ids = ids_for(model, N_TOKENS)[:n]
    whole = careless.forward(ids)
    fed, sequence = Fed(careless, n, 1), CacheSequence()
    one_by_one = np.concatenate([fed.feed([(sequence, ids[part])])[0] for part in cuts(n, 1)])
    assert nmse(whole, expected[:n]) < 1e-5  # right, but for rounding
    assert (whole != one_by_one).any()


def test_a_nan_is_found_and_named(model: Model) -> None:
    def spoil(x: Any) -> Any:
        x = x.copy()
        x[3, 5] = np.nan
        return x

    name = "attn_norm-1"
    trace = Trace(watch=True, replace={name: spoil})
    seen: list[str] = []
    with pytest.raises(refengine.errors.TraceError, match="is the first with a non-finite value") as caught:
        model.forward(ids_for(model, 6), trace=trace)
    seen.append(str(caught.value))
    after = next(n for n in list(trace.seen)[list(trace.seen).index(name) + 1 :])
    assert f"tensor {after} " in seen[0]


def test_the_host_runs_kernels_only(tiny_model: ModelFiles) -> None:
    with pytest.raises(RequestError, match="runs the CUDA kernels, which need numerics fast; use cpu for exact"):
        refengine.load(tiny_model("llama-f32"), "host", "exact")
    model = refengine.load(tiny_model("llama-q4_0"), "host")
    assert (model.device.name, model.ops.numerics.name) == ("host", "fast")
