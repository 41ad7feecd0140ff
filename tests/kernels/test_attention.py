"""Attention over the block table: against float64, and bit for bit the same however tokens, rows and blocks lie."""

from typing import Any

import numpy as np
import pytest

from refengine.cache.paged import CacheSequence, KVCache
from refengine.errors import KernelError
from refengine.ops.halves import to_halves
from refengine.trace import to_numpy
from tests.kernels.op_twins import OpsThere

HALF = 2.0**-11  # float16: half a unit in the last place, relative


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


def shown(name: str, x: Any) -> Any:
    return x


class Text:
    """Q, K and V of sequences of given lengths, all random, rows of very different size where `sizes` says so."""

    def __init__(
        self, lengths: list[int], n_head: int, n_head_kv: int, head_dim: int, seed: int = 1, sizes: Any = (1.0,)
    ) -> None:
        rng = np.random.default_rng(seed)
        self.lengths, self.n_head, self.n_head_kv, self.head_dim = lengths, n_head, n_head_kv, head_dim

        def rows(n: int, heads: int) -> np.ndarray:
            scale = rng.choice(np.array(sizes, np.float32), (n, heads, 1))
            return (rng.standard_normal((n, heads, head_dim)) * scale).astype(np.float32)

        self.q = [rows(n, n_head) for n in lengths]
        self.k = [rows(n, n_head_kv) for n in lengths]
        self.v = [rows(n, n_head_kv) for n in lengths]
        self.sinks = rng.standard_normal(n_head).astype(np.float32) * 2

    def run(
        self,
        there: OpsThere,
        steps: list[list[int]],
        blocks: Any = None,
        splits: bool | None = None,
        block_size: int = 64,
        **options: Any,
    ) -> list[np.ndarray]:
        """Outputs (n, n_head * head_dim) of every sequence; steps[i][j] tokens of sequence j in the i-th call.

        blocks: which blocks of the cache are taken, in order.
        """
        n_blocks = sum(-(-n // block_size) for n in self.lengths)
        cache = there.cache(self.n_head_kv, self.head_dim, 2 * n_blocks + 1, block_size)
        if blocks is not None:
            take = iter(np.random.default_rng(blocks).permutation(2 * n_blocks + 1).tolist())
            cache.pool.allocate = lambda n: [next(take) for _ in range(n)]  # type: ignore[method-assign]
        sequences = [CacheSequence() for _ in self.lengths]
        outputs: list[list[np.ndarray]] = [[] for _ in self.lengths]
        for step in steps:
            live = [j for j, n in enumerate(step) if n]
            at = {j: slice(sequences[j].length, sequences[j].length + step[j]) for j in live}
            parts = [(sequences[j], [0] * step[j]) for j in live]
            batch = cache.batch(parts)
            there.kv_append(cache.k[0], np.concatenate([self.k[j][at[j]] for j in live]), batch.slots)
            there.kv_append(cache.v[0], np.concatenate([self.v[j][at[j]] for j in live]), batch.slots)
            q = np.concatenate([self.q[j][at[j]] for j in live])
            y = there.attention(q, cache.k[0], cache.v[0], batch, scale=0.125, probe=shown, splits=splits, **options)
            cache.commit(parts)
            start = 0
            for j in live:
                outputs[j].append(y[start : start + step[j]])
                start += step[j]
        return [np.concatenate(o) for o in outputs]

    def exact(self, j: int, window: int = 0, sinks: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """CacheSequence j in float64, (n, n_head * head_dim); and Σ weight · |v|, what errors are relative to."""
        group = self.n_head // self.n_head_kv
        q = self.q[j].astype(np.float64).transpose(1, 0, 2)
        k = np.repeat(self.k[j].astype(np.float64).transpose(1, 0, 2), group, axis=0)
        v = np.repeat(self.v[j].astype(np.float64).transpose(1, 0, 2), group, axis=0)
        scores = q @ k.transpose(0, 2, 1) * 0.125
        back = np.arange(len(self.q[j]))[:, None] - np.arange(len(self.k[j]))[None, :]
        scores[:, (back < 0) | ((back >= window) if window else False)] = -np.inf
        top = scores.max(axis=-1, keepdims=True)
        e = np.exp(scores - top)
        total = e.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks.astype(np.float64)[:, None, None] - top)
        p = e / total
        n = len(self.q[j])
        return (p @ v).transpose(1, 0, 2).reshape(n, -1), (p @ np.abs(v)).transpose(1, 0, 2).reshape(n, -1)

    def score_error(self, j: int) -> float:
        """How far a score may be off where Q and K are rounded to half precision: at most 2 · 2^-11 · Σ |q| |k|."""
        q, k = np.abs(self.q[j]).astype(np.float64), np.abs(self.k[j]).astype(np.float64)
        return float(2 * HALF * 0.125 * np.einsum("thd,td->th", q, k.max(axis=(0, 1))[None].repeat(len(q), 0)).max())


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim"), [(2, 2, 64), (6, 3, 48), (14, 2, 64), (4, 4, 96), (4, 1, 128), (8, 4, 8)]
)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_near_float64(
    n_head: int, n_head_kv: int, head_dim: int, window: int, with_sinks: bool, there: OpsThere
) -> None:
    text = Text([70], n_head, n_head_kv, head_dim)
    sinks = text.sinks if with_sinks else None
    (y,) = text.run(there, [[70]], window=window, sinks=sinks)
    expected, magnitude = text.exact(0, window, sinks)
    # A score off by d changes weights by e^d - 1, on both sides of the quotient; P and V are rounded once each.
    d = text.score_error(0)
    bound = (2 * np.expm1(d) + 2 * HALF + 1e-5) * magnitude
    assert (np.abs(y - expected) <= bound).all()
    # W-1822 allows 1 %. Random errors do not add up: this is what it comes to.
    assert np.sqrt(((y - expected) ** 2).mean() / (expected**2).mean()) < 1e-3


def test_long_texts_cross_tiles_and_splits(there: OpsThere) -> None:
    text = Text([700], 2, 1, 16)
    whole = text.run(there, [[700]], splits=False)[0]
    np.testing.assert_array_equal(text.run(there, [[700]], splits=True)[0], whole)
    expected, _ = text.exact(0)
    assert np.sqrt(((whole - expected) ** 2).mean() / (expected**2).mean()) < 1e-3
    one_by_one = text.run(there, [[640], *[[1]] * 10, [50]], splits=True)[0]
    np.testing.assert_array_equal(one_by_one, whole)


@pytest.mark.parametrize("window", [0, 70])
def test_every_way_to_run_it_gives_the_same_bits(window: int, there: OpsThere) -> None:
    """Whole, in chunks, one at a time, beside other sequences, in shuffled blocks, with positions cut up or not."""
    text = Text([150, 40, 90], 6, 3, 48)
    alone = [Text([n], 6, 3, 48) for n in text.lengths]
    for j, one in enumerate(alone):
        one.q, one.k, one.v = [text.q[j]], [text.k[j]], [text.v[j]]
    options: dict[str, Any] = {"window": window, "sinks": text.sinks}
    expected = [one.run(there, [[n]], **options)[0] for one, n in zip(alone, text.lengths, strict=True)]
    ways = {
        "together": text.run(there, [text.lengths], **options),
        "together, cut up": text.run(there, [text.lengths], splits=True, **options),
        "shuffled": text.run(there, [text.lengths], blocks=3, **options),
        "blocks of 128": text.run(there, [text.lengths], blocks=3, block_size=128, **options),
        "chunks": text.run(there, [[100, 1, 0], [7, 39, 64], [43, 0, 26]], blocks=4, **options),
        "one by one": text.run(there, [[149, 39, 89], [1, 1, 1]], **options),
        "one by one, cut up": text.run(there, [[149, 39, 89], [1, 1, 1]], splits=True, blocks=5, **options),
    }
    for way, outputs in ways.items():
        for j, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
            np.testing.assert_array_equal(got, wanted, err_msg=f"{way}, sequence {j}")


def test_rows_of_any_size_keep_their_precision(there: OpsThere) -> None:
    """Values of 1e6 beside values of 1e-6, and all of them so: float16 as it is would lose either."""
    for sizes in ((1e6,), (1e-6,), (1e4, 1.0, 1e-4)):
        text = Text([80], 2, 1, 32, sizes=sizes)
        for part in (text.q, text.k):  # scores of ordinary size, made of large times small
            part[0] /= np.abs(part[0]).max(axis=-1, keepdims=True)
        text.q[0] *= np.float32(1e6)
        text.k[0] *= np.float32(1e-6)
        y = text.run(there, [[80]])[0]
        expected, magnitude = text.exact(0)
        assert (np.abs(y - expected) <= 8 * HALF * magnitude).all()


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_is_seen_by_those_who_look_at_it(part: str, there: OpsThere) -> None:
    text = Text([100], 2, 2, 32)
    getattr(text, part)[0][50, 1, 3] = np.nan
    y = text.run(there, [[1]] * 0 + [[40], [30], [30]])[0].reshape(100, 2, 32)
    assert np.isfinite(y[:, 0]).all()
    assert np.isfinite(y[:40, 1]).all()  # computed before it came
    hit = y[50:51, 1] if part == "q" else y[50:, 1]
    bad = ~np.isfinite(hit)
    assert bad.any(axis=-1).all()


def test_what_nobody_wrote_is_not_read(there: OpsThere) -> None:
    text = Text([70], 2, 1, 32)
    clean = text.run(there, [[70]])[0]
    make = there.ops.kv_arrays

    def spoilt(n: int, shape: tuple[int, ...]) -> Any:
        arrays = make(n, shape)
        for a in arrays:
            a.values[...] = there.put(np.array(np.nan, np.float16))
            a.exponents[...] = 255
        return arrays

    there.ops.kv_arrays = spoilt  # type: ignore[method-assign]
    try:
        np.testing.assert_array_equal(text.run(there, [[60], [10]])[0], clean)
    finally:
        there.ops.kv_arrays = make  # type: ignore[method-assign]


def test_kv_append_is_its_twin(there: OpsThere) -> None:
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((5, 2, 24)) * 10.0 ** rng.integers(-8, 6, (5, 2, 1))).astype(np.float32)
    x[1, 0] = 0
    cache: KVCache = there.cache(2, 24, 3, block_size=4)
    slots = np.array([7, 2, 11, 3, 0], np.int64)
    there.kv_append(cache.k[0], x, slots)
    halves, exponents = to_halves(np, x)
    at = slots // 4, slice(None), slots % 4  # blocks, heads, offsets
    values, stored = to_numpy(cache.k[0].values), to_numpy(cache.k[0].exponents)
    assert values.shape == (3, 2, 4, 24)
    np.testing.assert_array_equal(values[at].view(np.uint16), halves.view(np.uint16))
    np.testing.assert_array_equal(stored[at], exponents[..., 0] + 127)


def test_what_does_not_fit_is_refused_before_the_launch(there: OpsThere) -> None:
    cache = there.cache(2, 24, 3)
    with pytest.raises(KernelError, match=r"slots 5 to 192 of 192"):
        there.kv_append(cache.k[0], np.zeros((2, 2, 24), np.float32), np.array([5, 192]))
    with pytest.raises(KernelError, match=r"new rows' array has the shape \(2, 3, 24\), expected \(2, 2, 24\)"):
        there.kv_append(cache.k[0], np.zeros((2, 3, 24), np.float32), np.array([5, 6]))
    wide = there.cache(1, 256, 1)
    batch = wide.batch([(CacheSequence(), [0])])
    with pytest.raises(KernelError, match="kernels support multiples of 8 up to 128"):
        there.attention(np.zeros((1, 1, 256), np.float32), wide.k[0], wide.v[0], batch, scale=1.0, probe=shown)
    narrow = there.cache(1, 32, 4, block_size=16)
    batch = narrow.batch([(CacheSequence(), [0])])
    with pytest.raises(KernelError, match="blocks of 16 positions are not a multiple of 64"):
        there.attention(np.zeros((1, 1, 32), np.float32), narrow.k[0], narrow.v[0], batch, scale=1.0, probe=shown)
