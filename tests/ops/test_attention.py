"""Attention over the paged cache against a scalar loop in float64 that knows no pages."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refengine.cache.paged import Batch, CacheSequence, KVCache
from refengine.ops import Ops, profile
from refengine.ops.attention import attention, causal_mask, kv_append, kv_read, soft_max
from tests.model_files import zeros_of

Array = np.ndarray
N_HEAD, N_HEAD_KV, HEAD_DIM = 6, 2, 7
SCALE = 0.37
# float64 throughout: sums of up to 20 terms of order 1.
FLOAT64 = 1e-13
# float32: products of 7 terms up to 10 (10 × 2^-24 × a few) go through exp; the weighted sum averages. Measured 3e-7.
FLOAT32 = 4e-6


def reference(
    q: Array, k: Array, v: Array, first: int, *, scale: float, window: int = 0, sinks: Array | None = None
) -> Array:
    """Attention of one sequence. q: (n, N_HEAD, HEAD_DIM) at positions first..; k, v: (n_kv, N_HEAD_KV, HEAD_DIM)."""
    out = np.zeros((len(q), N_HEAD * HEAD_DIM))
    for t in range(len(q)):
        position = first + t
        oldest = max(0, position - window + 1) if window else 0
        seen = range(oldest, position + 1)
        for h in range(N_HEAD):
            g = h // (N_HEAD // N_HEAD_KV)
            scores = [scale * math.fsum(float(q[t, h, d]) * float(k[j, g, d]) for d in range(HEAD_DIM)) for j in seen]
            extra = [] if sinks is None else [float(sinks[h])]
            top = max(scores + extra)
            total = math.fsum(math.exp(s - top) for s in scores + extra)
            weights = [math.exp(s - top) / total for s in scores]
            for d in range(HEAD_DIM):
                out[t, h * HEAD_DIM + d] = math.fsum(w * float(v[j, g, d]) for w, j in zip(weights, seen, strict=True))
    return out


def shown(name: str, x: Array) -> Array:
    return x


class Case:
    """Two sequences with a past, blocks of 4 in mixed order, and a batch of 5 + 3 new tokens."""

    def __init__(self, dtype: Any, kv_dtype: Any) -> None:
        rng = np.random.default_rng(12)
        self.cache = KVCache(zeros_of(kv_dtype), 1, N_HEAD_KV, HEAD_DIM, n_ctx=64, n_blocks=12, block_size=4)
        for array in (self.cache.k[0], self.cache.v[0]):
            array[:] = np.nan  # what nobody wrote must not be read
        self.past, self.new = (9, 2), (5, 3)
        self.sequences = [CacheSequence(), CacheSequence()]
        # A block of one between the blocks of the other, so that the first table is not contiguous.
        for i, n in ((0, 4), (1, 1), (0, 5), (1, 1)):
            self._append(rng, i, n)
        self.k = [self._rows(self.cache.k[0], s) for s in self.sequences]
        self.v = [self._rows(self.cache.v[0], s) for s in self.sequences]
        parts = [(s, [0] * n) for s, n in zip(self.sequences, self.new, strict=True)]
        self.batch: Batch = self.cache.batch(parts)
        k_new, v_new = (rng.normal(size=(8, N_HEAD_KV, HEAD_DIM)).astype(kv_dtype) for _ in range(2))
        kv_append(np, self.cache.k[0], k_new.astype(dtype), self.batch.slots)
        kv_append(np, self.cache.v[0], v_new.astype(dtype), self.batch.slots)
        for i, rows in enumerate((slice(0, 5), slice(5, 8))):
            self.k[i] = np.concatenate([self.k[i], k_new[rows]])
            self.v[i] = np.concatenate([self.v[i], v_new[rows]])
        self.q = rng.normal(0, 1.5, size=(8, N_HEAD, HEAD_DIM)).astype(dtype)
        self.sinks = rng.normal(0, 2, size=N_HEAD).astype(np.float32)

    def _append(self, rng: np.random.Generator, i: int, n: int) -> None:
        part = [(self.sequences[i], [0] * n)]
        batch = self.cache.batch(part)
        for array in (self.cache.k[0], self.cache.v[0]):
            kv_append(np, array, rng.normal(size=(n, N_HEAD_KV, HEAD_DIM)), batch.slots)
        self.cache.commit(part)

    def _rows(self, array: Array, sequence: CacheSequence) -> Array:
        return np.stack([array[sequence.block_table[p // 4], p % 4] for p in range(sequence.length)])

    def expected(self, **kwargs: Any) -> Array:
        return np.concatenate(
            [
                reference(self.q[rows], self.k[i], self.v[i], self.past[i], **kwargs)
                for i, rows in enumerate((slice(0, 5), slice(5, 8)))
            ]
        )

    def run(
        self,
        *,
        window: int = 0,
        sinks: Array | None = None,
        round_to: Any = None,
        probe: Callable[..., Array] = shown,
    ) -> Array:
        return attention(
            np,
            self.q,
            self.cache.k[0],
            self.cache.v[0],
            self.batch.spans,
            self.batch.positions,
            scale=SCALE,
            window=window,
            sinks=sinks,
            round_to=round_to,
            sum_dtype=self.q.dtype,
            probe=probe,
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, FLOAT32), (np.float64, FLOAT64)])
@pytest.mark.parametrize("window", [0, 1, 3, 6, 64])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_the_formula(dtype: Any, tolerance: float, window: int, with_sinks: bool) -> None:
    case = Case(dtype, dtype)
    sinks = case.sinks if with_sinks else None
    y = case.run(window=window, sinks=sinks)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, case.expected(scale=SCALE, window=window, sinks=sinks), rtol=0, atol=tolerance)


def test_the_reference_sees_each_parameter() -> None:
    """Control: a window one token off, no sinks or another scale are far outside the tolerance."""
    case = Case(np.float32, np.float32)
    y = case.run(window=3, sinks=case.sinks)
    wrong: list[dict[str, Any]] = [
        {"scale": SCALE, "window": 4, "sinks": case.sinks},
        {"scale": SCALE, "window": 3},
        {"scale": SCALE * 1.001, "window": 3, "sinks": case.sinks},
    ]
    for parameters in wrong:
        assert np.abs(y - case.expected(**parameters)).max() > 10 * FLOAT32


def test_float16_cache_is_read_as_it_is() -> None:
    case = Case(np.float64, np.float16)
    assert case.cache.k[0].dtype == np.float16
    np.testing.assert_allclose(case.run(), case.expected(scale=SCALE), rtol=0, atol=FLOAT64)


def test_rounding_as_llamacpp_rounds() -> None:
    # Q and the softmax weights go through float16 before their products; nothing else does.
    case = Case(np.float64, np.float16)
    seen: dict[str, list[Array]] = {}

    def probe(name: str, x: Array) -> Array:
        seen.setdefault(name, []).append(x.copy())
        return x

    y = case.run(round_to=np.float16, probe=probe)
    for i, rows in enumerate((slice(0, 5), slice(5, 8))):
        q = case.q[rows].astype(np.float16).astype(np.float64)
        kv_head = np.arange(N_HEAD) // (N_HEAD // N_HEAD_KV)
        kq = np.einsum("thd,jhd->htj", q, case.k[i].astype(np.float64)[:, kv_head])
        np.testing.assert_allclose(seen["kq"][i], kq, rtol=0, atol=FLOAT64)
        p = seen["kq_soft_max"][i].astype(np.float16).astype(np.float64)
        kqv = np.einsum("htj,jhd->thd", p, case.v[i].astype(np.float64)[:, kv_head])
        np.testing.assert_allclose(y[rows], kqv.reshape(len(q), -1), rtol=0, atol=FLOAT64)
    assert np.abs(y - case.run()).max() > 1e-5, "control: without the rounding the result is another"


def test_probe_shows_shapes_and_its_answer_is_used() -> None:
    case = Case(np.float32, np.float32)
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def probe(name: str, x: Array) -> Array:
        shapes.append((name, x.shape))
        return np.zeros_like(x) if name == "kqv" else x

    assert not case.run(probe=probe).any()
    assert shapes == [
        ("kq", (N_HEAD, 5, 14)),
        ("kq_soft_max", (N_HEAD, 5, 14)),
        ("kqv", (N_HEAD, 5, HEAD_DIM)),
        ("kq", (N_HEAD, 3, 5)),
        ("kq_soft_max", (N_HEAD, 3, 5)),
        ("kqv", (N_HEAD, 3, HEAD_DIM)),
    ]


def test_masked_weights_are_exactly_zero_and_rows_sum_to_one() -> None:
    case = Case(np.float32, np.float32)
    weights: list[Array] = []

    def probe(name: str, x: Array) -> Array:
        if name == "kq_soft_max":
            weights.append(x)
        return x

    case.run(window=3, probe=probe)
    for t in range(5):
        outside = [j for j in range(14) if not 0 <= 9 + t - j < 3]
        assert not weights[0][:, t, outside].any()
        assert (weights[0][:, t, 9 + t] > 0).all()
    np.testing.assert_allclose(weights[0].sum(-1), 1, rtol=0, atol=14 * 2.0**-24)
    case.run(sinks=case.sinks, probe=probe)
    assert (weights[-1].sum(-1) < 0.999).all(), "sinks take their share"


def test_causal_mask() -> None:
    mask = causal_mask(np, np.array([2, 3]), 5, 0)
    np.testing.assert_array_equal(mask, [[False, False, False, True, True], [False, False, False, False, True]])
    mask = causal_mask(np, np.array([2, 3]), 5, 2)
    np.testing.assert_array_equal(mask, [[True, False, False, True, True], [True, True, False, False, True]])


def test_soft_max_of_huge_scores_is_finite() -> None:
    kq = np.array([[[1e38, 1e38, -1e38]]], np.float32)
    y = soft_max(np, kq, np.zeros((1, 3), bool), 1.0, None)
    np.testing.assert_array_equal(y, [[[0.5, 0.5, 0]]])
    y = soft_max(np, kq, np.zeros((1, 3), bool), 1.0, np.array([1e38], np.float32))
    np.testing.assert_allclose(y, [[[1 / 3, 1 / 3, 0]]], rtol=2.0**-23)


def test_kv_read_of_neighbours_is_a_view_and_of_others_is_in_order() -> None:
    cache = np.arange(5 * 4 * 2 * 3, dtype=np.float32).reshape(5, 4, 2, 3)
    neighbours = kv_read(np, cache, np.array([1, 2]), 7, np.float32)
    assert np.shares_memory(neighbours, cache)
    np.testing.assert_array_equal(neighbours, cache.reshape(20, 2, 3)[4:11])
    scattered = kv_read(np, cache, np.array([3, 0]), 6, np.float64)
    np.testing.assert_array_equal(scattered, cache.reshape(20, 2, 3)[[12, 13, 14, 15, 0, 1]])
    assert scattered.dtype == np.float64
    descending = kv_read(np, cache, np.array([2, 1]), 8, np.float32)
    np.testing.assert_array_equal(descending, cache.reshape(20, 2, 3)[[8, 9, 10, 11, 4, 5, 6, 7]])


def test_kv_append_writes_only_its_slots() -> None:
    cache = np.full((3, 4, 2, 3), -1, np.float16)
    new = np.arange(2 * 2 * 3).reshape(2, 2, 3) / 3
    kv_append(np, cache, new.astype(np.float32), np.array([7, 2]))
    flat = cache.reshape(12, 2, 3)
    np.testing.assert_array_equal(flat[[7, 2]], new.astype(np.float16))
    assert (flat[[0, 1, 3, 4, 5, 6, 8, 9, 10, 11]] == -1).all()


@pytest.mark.parametrize(
    ("numerics", "kv_type", "rounds"), [("llamacpp", None, True), ("llamacpp", "f32", False), ("exact", "f16", False)]
)
def test_only_llamacpp_with_a_float16_cache_rounds(numerics: str, kv_type: str | None, rounds: bool) -> None:
    ops = Ops(np, profile(numerics, kv_type), 0)
    case = Case(np.float32, ops.numerics.kv_dtype)
    y = ops.attention(case.q, case.cache.k[0], case.cache.v[0], case.batch, scale=SCALE, probe=shown)
    assert y.dtype == np.float32
    error = np.abs(y - case.expected(scale=SCALE)).max()
    assert (error > 1e-5) == rounds, error  # float16 has 11 bits: errors near 2^-12
