"""Products with stored matrices against scalar loops over the stored blocks, and the bounded cache of float values."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.errors import ModelError
from refengine.ops import DequantCache, Ops, dequant, linear, profile
from refengine.weights import Matrix

T = GGMLQuantizationType
Array = np.ndarray
N_IN = 96  # three blocks of 32
# float32 sum of 96 products of order 1, and its rounding: a few times 2^-24 × sqrt(96), rounded up; absolute, because
# sums cancel.
FLOAT32 = 1e-5
# The llamacpp profile sums in float64 and rounds once to float32: values up to 40, 40 × 2^-25.
ROUNDED_ONCE = 1.3e-6


def q8_0_rows(rng: np.random.Generator, n_rows: int) -> tuple[bytes, Array]:
    """Random Q8_0 blocks as ggml lays them out (float16 d, 32 int8), and their values d·q decoded one by one."""
    raw, values = b"", np.empty((n_rows, N_IN))
    for row in range(n_rows):
        for block in range(N_IN // 32):
            codes = [int(c) for c in rng.integers(-127, 128, 32)]
            d = float(np.float16(rng.uniform(0.002, 0.02)))
            raw += struct.pack("<e32b", d, *codes)
            values[row, block * 32 : block * 32 + 32] = [d * c for c in codes]
    return raw, values


def matrix(type_: T, shape: tuple[int, ...], raw: bytes, name: str = "w") -> Matrix:
    return Matrix(name, type_, shape, np.frombuffer(raw, np.uint8))


def f32_matrix(rng: np.random.Generator, *shape: int) -> tuple[Matrix, Array]:
    values = rng.normal(size=shape).astype(np.float32)
    return matrix(T.F32, shape, values.tobytes()), values


def product(x: Array, w: Array) -> Array:
    """x Wᵀ by exact sums of float64 products."""
    return np.array([[math.fsum(float(a) * float(b) for a, b in zip(r, c, strict=True)) for c in w] for r in x])


def run(x: Array, w: Matrix, numerics: str = "exact", cache_bytes: int = 0) -> Array:
    return Ops(np, profile(numerics), cache_bytes).linear(x, w)


@pytest.mark.parametrize(
    ("numerics", "tolerance"), [("exact", FLOAT32), ("exact64", 1e-13), ("llamacpp", ROUNDED_ONCE)]
)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_f32_product(numerics: str, tolerance: float, cache_bytes: int) -> None:
    rng = np.random.default_rng(20)
    w, values = f32_matrix(rng, 7, N_IN)
    x: Array = rng.normal(size=(5, N_IN)).astype(profile(numerics).dtype)
    y = run(x, w, numerics, cache_bytes)
    assert y.dtype == profile(numerics).dtype
    np.testing.assert_allclose(y, product(x, values), rtol=0, atol=tolerance)
    assert np.abs(y - product(x, values[::-1])).max() > 0.1, "control: rows in another order"


@pytest.mark.parametrize(("numerics", "tolerance"), [("exact", FLOAT32), ("exact64", 1e-13)])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_q8_0_product_uses_the_stored_values(numerics: str, tolerance: float, cache_bytes: int) -> None:
    rng = np.random.default_rng(21)
    raw, values = q8_0_rows(rng, 7)
    x: Array = rng.normal(size=(5, N_IN)).astype(profile(numerics).dtype)
    y = run(x, matrix(T.Q8_0, (7, N_IN), raw), numerics, cache_bytes)
    np.testing.assert_allclose(y, product(x, values), rtol=0, atol=tolerance)


def q8_activation(row: Array) -> tuple[list[float], list[list[int]]]:
    """Unrounded scale and codes of each block of 32, as ggml's x86 `quantize_row_q8_0` has them, in float32 steps."""
    scales, codes = [], []
    for block in row.astype(np.float32).reshape(-1, 32):
        largest = np.abs(block).max()
        inverse = np.float32(127) / largest
        scales.append(float(largest / np.float32(127)))
        codes.append([round(float(v * inverse)) for v in block])  # Python rounds half to even
    return scales, codes


def test_q8_0_product_as_llamacpp() -> None:
    # ggml_vec_dot_q8_0_q8_0: per block the integer dot product times both float16 scales.
    rng = np.random.default_rng(22)
    raw, values = q8_0_rows(rng, 7)
    x = rng.normal(size=(5, N_IN)).astype(np.float32)
    expected = np.zeros((5, 7))
    for t, row in enumerate(x):
        for block, (d, codes) in enumerate(zip(*q8_activation(row), strict=True)):
            for n in range(7):
                w_d, *w_codes = struct.unpack_from("<e32b", raw, (n * 3 + block) * 34)
                dot = sum(a * b for a, b in zip(codes, w_codes, strict=True))
                expected[t, n] += float(np.float16(d)) * w_d * dot
    y = run(x, matrix(T.Q8_0, (7, N_IN), raw), "llamacpp")
    np.testing.assert_allclose(y, expected, rtol=0, atol=ROUNDED_ONCE)
    assert np.abs(y - product(x, values)).max() > 100 * ROUNDED_ONCE, "control: rounding the activation is seen"


def test_q4_1_product_as_llamacpp() -> None:
    # ggml_vec_dot_q4_1_q8_1: d_w·d_x·Σ q_w q_x + m_w·s, s the float16 sum that the Q8_1 block carries.
    rng = np.random.default_rng(23)
    n_blocks, n_out = N_IN // 32, 7
    raw, blocks = b"", {}
    for n in range(n_out):
        for block in range(n_blocks):
            d, m = float(np.float16(rng.uniform(0.05, 0.2))), float(np.float16(rng.uniform(-2, 2)))
            packed = [int(b) for b in rng.integers(0, 256, 16)]
            raw += struct.pack("<ee16B", d, m, *packed)
            blocks[n, block] = (d, m, [b & 15 for b in packed] + [b >> 4 for b in packed])
    x = rng.normal(0.5, 1, size=(5, N_IN)).astype(np.float32)
    expected, without_sums = np.zeros((5, n_out)), np.zeros((5, n_out))
    for t, row in enumerate(x):
        for block, (d_x, codes) in enumerate(zip(*q8_activation(row), strict=True)):
            half_d = float(np.float16(d_x))
            s = float(np.float16(np.float32(d_x) * np.float32(sum(codes))))
            for n in range(n_out):
                d, m, w_codes = blocks[n, block]
                dot = sum(a * b for a, b in zip(codes, w_codes, strict=True))
                expected[t, n] += d * half_d * dot + m * s
                without_sums[t, n] += d * half_d * dot + m * half_d * sum(codes)
    w = matrix(T.Q4_1, (n_out, N_IN), raw)
    for cache_bytes in (0, 1 << 20):
        y = run(x, w, "llamacpp", cache_bytes)
        np.testing.assert_allclose(y, expected, rtol=0, atol=4 * ROUNDED_ONCE)  # values up to 150
        assert np.abs(y - without_sums).max() > 100 * ROUNDED_ONCE, "control: the correction is seen"


def test_bias_is_added() -> None:
    rng = np.random.default_rng(24)
    w, values = f32_matrix(rng, 7, N_IN)
    x, bias = rng.normal(size=(5, N_IN)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    y = Ops(np, profile("exact"), 0).linear(x, w, bias)
    np.testing.assert_allclose(y, product(x, values) + bias, rtol=0, atol=FLOAT32)


def test_matrix_that_is_not_cached_is_done_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(25)
    raw, values = q8_0_rows(rng, 11)
    x = rng.normal(size=(3, N_IN)).astype(np.float32)
    asked: list[tuple[int, int]] = []
    original = dequant.float_rows

    def spy(xp: Any, w: Any, start: int, stop: int, dtype: Any) -> Any:
        asked.append((start, stop))
        return original(xp, w, start, stop, dtype)

    monkeypatch.setattr(linear, "float_rows", spy)
    monkeypatch.setattr(linear, "SLICE_ELEMENTS", 4 * N_IN + 5)
    y = run(x, matrix(T.Q8_0, (11, N_IN), raw))
    assert asked == [(0, 4), (4, 8), (8, 11)]
    np.testing.assert_allclose(y, product(x, values), rtol=0, atol=FLOAT32)
    monkeypatch.setattr(linear, "SLICE_ELEMENTS", 1)  # never less than one row
    np.testing.assert_allclose(run(x, matrix(T.Q8_0, (11, N_IN), raw)), product(x, values), rtol=0, atol=FLOAT32)


def test_embedding_takes_rows() -> None:
    raw, values = q8_0_rows(np.random.default_rng(26), 7)
    ids = np.array([6, 0, 3, 3])
    for numerics in ("exact", "exact64", "llamacpp"):
        y = Ops(np, profile(numerics), 0).embedding(matrix(T.Q8_0, (7, N_IN), raw), ids)
        assert y.dtype == profile(numerics).dtype
        np.testing.assert_array_equal(y, values[ids])  # d·q of a float16 and an 8-bit number is exact


@pytest.mark.parametrize("shared_rows", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_experts(shared_rows: bool, cache_bytes: int) -> None:
    rng = np.random.default_rng(27)
    raw, values = q8_0_rows(rng, 5 * 7)
    w = matrix(T.Q8_0, (5, 7, N_IN), raw)
    chosen = np.array([[4, 1, 0], [1, 4, 2], [2, 0, 1], [0, 2, 4]])  # expert 3 is never chosen
    x = rng.normal(size=(4, 1 if shared_rows else 3, N_IN)).astype(np.float32)
    y = Ops(np, profile("exact"), cache_bytes).linear_experts(x, w, chosen)
    assert y.shape == (4, 3, 7)
    per_expert = values.reshape(5, 7, N_IN)
    for t in range(4):
        for rank in range(3):
            row = x[t, 0 if shared_rows else rank][None]
            expected = product(row, per_expert[chosen[t, rank]])[0]
            np.testing.assert_allclose(y[t, rank], expected, rtol=0, atol=FLOAT32)


def test_rows_of_ops() -> None:
    ops, x = Ops(np, profile("exact"), 0), np.arange(15.0).reshape(5, 3)
    np.testing.assert_array_equal(ops.rows(x, np.array([4, 1])), x[[4, 1]])
    np.testing.assert_array_equal(ops.rows(x, np.array([1, 0, 2, 3, 4])), x[[1, 0, 2, 3, 4]])
    assert ops.rows(x, np.arange(5)) is x


# ---- the cache ----------------------------------------------------------------------------------------------------


def q8_matrix(name: str, n_out: int, seed: int) -> Matrix:
    return matrix(T.Q8_0, (n_out, N_IN), q8_0_rows(np.random.default_rng(seed), n_out)[0], name)


def test_cache_keeps_what_came_first_within_its_budget() -> None:
    row = N_IN * 4  # bytes of a float32 row
    cache = DequantCache(10 * row)
    a, b, c = q8_matrix("a", 6, 1), q8_matrix("b", 5, 2), q8_matrix("c", 4, 3)
    kept = cache.get(np, a, 0, 6, np.float32)
    assert cache.get(np, b, 0, 5, np.float32) is None  # 6 + 5 rows do not fit
    assert cache.get(np, c, 0, 4, np.float32) is not None  # 6 + 4 do, to the byte
    assert (cache.n_bytes, len(cache)) == (10 * row, 2)
    assert cache.get(np, a, 0, 6, np.float32) is kept
    assert cache.get(np, b, 0, 1, np.float32) is None
    assert (cache.n_bytes, len(cache)) == (10 * row, 2)
    assert DequantCache(6 * row - 1).get(np, a, 0, 6, np.float32) is None


def test_cache_counts_the_type_it_stores() -> None:
    cache = DequantCache(6 * N_IN * 8)
    assert cache.get(np, q8_matrix("a", 7, 1), 0, 7, np.float64) is None
    found = cache.get(np, q8_matrix("a", 6, 1), 0, 6, np.float64)
    assert found is not None
    assert (found.dtype, cache.n_bytes) == (np.float64, found.nbytes)


def test_cache_tells_matrices_and_rows_apart() -> None:
    cache = DequantCache(1 << 20)
    raw, values = q8_0_rows(np.random.default_rng(4), 6)
    w = matrix(T.Q8_0, (2, 3, N_IN), raw)
    for expert in (0, 1):
        rows = cache.get(np, w, 3 * expert, 3 * expert + 3, np.float32)
        np.testing.assert_array_equal(rows, values.reshape(2, 3, -1)[expert])
    other = q8_matrix("other", 3, 5)
    others = cache.get(np, other, 0, 3, np.float32)
    assert others is not None
    assert not np.array_equal(others, values[:3])
    assert len(cache) == 3


def test_empty_budget_keeps_nothing() -> None:
    ops = Ops(np, profile("exact"), 0)
    ops.linear(np.ones((1, N_IN), np.float32), q8_matrix("a", 3, 1))
    assert (len(ops.cache), ops.cache.n_bytes) == (0, 0)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fill_keeps_what_the_first_use_would_have_kept(
    dtype: Any, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequant, "BLOCK_ELEMENTS", 2 * N_IN + 5)  # two rows a block, and tails
    experts = matrix(T.Q8_0, (3, 3, N_IN), q8_0_rows(np.random.default_rng(3), 9)[0], "experts")
    floats = f32_matrix(np.random.default_rng(4), 4, N_IN)[0]
    given = [experts, q8_matrix("a", 7, 1), q8_matrix("b", 5, 2), q8_matrix("a", 7, 1), floats]
    lazy, cache = DequantCache(1 << 20), DequantCache(1 << 20)
    expected = {(w.name, e): lazy.get(np, w, e * r, e * r + r, dtype) for w in given for e, r in rows_of(w)}
    steps: list[tuple[int, int]] = []
    done = cache.fill(given, dtype, lambda *step: steps.append(step), n_threads)
    assert (len(cache), cache.n_bytes, done.n_bytes) == (len(lazy), lazy.n_bytes, lazy.n_bytes)
    # A float32 matrix is kept as a view of the file where float32 is wanted.
    n_weights = (7 + 5 + 9 + (4 if dtype == np.float64 else 0)) * N_IN
    assert (done.n_weights, steps[-1]) == (n_weights, (n_weights, n_weights))
    assert [step for step, _ in steps] == sorted({step for step, _ in steps})
    monkeypatch.setattr(dequant, "float_rows", None)  # From here on, nothing can be dequantised.
    for w in given:
        for e, r in rows_of(w):
            found = cache.get(np, w, e * r, e * r + r, dtype)
            assert found is not None
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, expected[w.name, e])
    assert cache.fill(given, dtype).n_bytes == 0, "what is there is not dequantised again"


def rows_of(w: Matrix) -> list[tuple[int, int]]:
    """(expert, rows of an expert) for each expert of a matrix; (0, rows) where there are none."""
    return [(e, w.shape[-2]) for e in range(w.shape[0] if len(w.shape) == 3 else 1)]


def test_fill_stays_within_the_budget_and_leaves_experts_that_do_not_all_fit() -> None:
    row = N_IN * 4
    experts = matrix(T.Q8_0, (2, 3, N_IN), q8_0_rows(np.random.default_rng(3), 6)[0], "experts")
    given = [experts, q8_matrix("a", 4, 1), q8_matrix("b", 5, 2), q8_matrix("c", 2, 3)]
    cache = DequantCache(8 * row)
    assert cache.fill(given, np.float32).n_weights == 6 * N_IN  # a and c; b does not fit beside a
    assert (cache.n_bytes, len(cache)) == (6 * row, 2)
    assert cache.get(np, experts, 0, 3, np.float32) is None
    cache = DequantCache(16 * row)
    assert cache.fill(given, np.float32).n_bytes == 11 * row  # 5 rows are left: one expert of the two would fit
    assert cache.get(np, experts, 3, 6, np.float32) is not None, "an expert that is chosen still takes the room"
    assert DequantCache(17 * row).fill(given, np.float32).n_bytes == 17 * row
    assert DequantCache(0).fill(given, np.float32).n_bytes == 0


def test_fill_that_fails_keeps_nothing() -> None:
    whole = q8_matrix("a", 4, 1)
    cut = Matrix("cut", T.Q8_0, (6, N_IN), whole.data[:-1])
    cache = DequantCache(1 << 20)
    with pytest.raises(ModelError, match="Q8_0: a tensor of shape"):
        cache.fill([whole, cut], np.float32)
    assert (len(cache), cache.n_bytes) == (0, 0)


@pytest.mark.parametrize("numerics", ["exact", "exact64", "llamacpp"])
def test_cache_does_not_change_the_product(numerics: str) -> None:
    rng = np.random.default_rng(28)
    w = q8_matrix("a", 7, 1)
    x: Array = rng.normal(size=(5, N_IN)).astype(profile(numerics).dtype)
    cached = Ops(np, profile(numerics), 1 << 20)
    first, second = cached.linear(x, w), cached.linear(x, w)
    assert len(cached.cache) == 1
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, run(x, w, numerics))  # one slice: the same call of the same product


def test_unknown_profile_and_cache_type_are_named() -> None:
    from refengine.errors import RequestError

    with pytest.raises(RequestError, match="unknown numerics profile 'faster'; choose one of exact, exact64, llamacpp"):
        profile("faster")
    with pytest.raises(RequestError, match="fast has a float16 KV cache, 'f32' was requested"):
        profile("fast", "f32")
    with pytest.raises(RequestError, match="unknown KV cache type 'q8_0'; choose one of f16, f32, f64"):
        profile("exact", "q8_0")
    assert profile("exact", "f16").kv_dtype is np.float16
    assert profile("llamacpp").kv_dtype is np.float16
    assert profile("llamacpp", "f32").as_llamacpp
