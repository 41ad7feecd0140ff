"""The attention of a step is the operations that it stands for, bit for bit; every access is checked."""

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest

from refengine.cache.paged import CacheSequence
from refengine.config import RopeConfig
from refengine.cuda.kernels import attention, attention_step
from refengine.cuda.kernels.attention import PagedRows, Projections, Rotation
from refengine.cuda.kernels.rope import rope_append
from refengine.cuda.runtime.launch import ForPlans
from refengine.cuda.runtime.source import read_source
from refengine.trace import to_numpy
from tests.kernels.op_twins import OpsThere

ROPE = RopeConfig(n_rot=24, freq_base=1e4, freq_scale=1.0, n_ctx_orig=4096, ext_factor=0.0, attn_factor=1.0)
EPS = 1e-5
N_POSITIONS = 1536


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Positions of sequences, the new one included: at the ends of tiles of 64, of two of them, and of splits of 512.
MIXED, SHORT, LONG = (1, 700, 64, 1100, 513), (1, 2, 63, 64, 65, 128, 129, 200), (511, 512, 513, 1024, 1025)
PAIRS, LIMITS = (256, 128, 129, 257, 320, 1), (512, 513, 640, 641, 768, 769, 1536)


def check_attention_of_a_step(
    there: OpsThere,
    heads: tuple[int, int, int],
    lengths: tuple[int, ...],
    *,
    window: int = 0,
    rope: str | None = "neox",
    norms: bool = False,
    sinks: bool = False,
    q_factor: float = 1.0,
    fused: bool = False,
    nan: bool = False,
    block_size: int = 64,
    for_plan: bool = False,
) -> None:
    """`attention_step` and `rope_append` against the operations one by one; heads: n_head, n_head_kv, head_dim.

    for_plan: by a kernel for this plan alone. fused: the rows of Q, K and V are parts of one row. nan: there are NaN in
    Q, K and V, and infinity in the cache.
    """
    n_head, n_head_kv, head_dim = heads
    n, rng, xp = len(lengths), np.random.default_rng(head_dim), there.xp
    n_blocks = sum(-(-length // block_size) for length in lengths)
    cache = there.cache(n_head_kv, head_dim, n_blocks, block_size)
    take = iter(rng.permutation(n_blocks).tolist())
    cache.pool.allocate = lambda n: [next(take) for _ in range(n)]  # type: ignore[method-assign]
    sequences = [CacheSequence() for _ in lengths]
    cache.batch([(s, [0] * length) for s, length in zip(sequences, lengths, strict=True)])
    for s, length in zip(sequences, lengths, strict=True):
        s.length = length - 1
    tables = np.zeros((n + 1, N_POSITIONS // block_size), np.int32)  # the last row is not there
    for i, s in enumerate(sequences):
        tables[i, : len(s.block_table)] = s.block_table
    positions = np.array([*(s.length for s in sequences), -1], np.int32)
    values = [rng.standard_normal(cache.k[0].values.shape).astype(np.float16) for _ in range(2)]
    q, k, v = (random(n + 1, count, head_dim, seed=i) for i, count in enumerate((n_head, n_head_kv, n_head_kv)))
    k[1] *= 1e6
    if nan:
        q[0, 0, 1] = k[1, 0, 2] = v[2, 0, 3] = np.nan
        for part, row in zip(values, (3, 4), strict=True):
            part[tables[row, 0], 0, 5, 4] = np.inf
    before = [values[0], values[1], *(rng.integers(120, 134, values[0].shape[:-1]).astype(np.uint8) for _ in range(2))]
    cached = [cache.k[0].values, cache.v[0].values, cache.k[0].exponents, cache.v[0].exponents]

    def fill_cache() -> None:
        for array, given in zip(cached, before, strict=True):
            array[...] = there.put(given)

    parts = [there.put(np.ascontiguousarray(part).reshape(-1)) for part in (q, k, v)]
    n_q, n_kv = n_head * head_dim, n_head_kv * head_dim
    strides = (n_q, n_kv, n_kv)
    if fused:
        whole = there.put(np.concatenate([part.reshape(n + 1, -1) for part in (q, k, v)], axis=1).reshape(-1))
        parts = [whole, whole[n_q:], whole[n_q + n_kv :]]
        strides = (sum(strides),) * 3
    projections = Projections((parts[0], parts[1], parts[2]), strides)
    weights = (random(head_dim, seed=8), random(head_dim, seed=9)) if norms else (None, None)
    of_sinks = random(n_head, seed=7) if sinks else None
    rotation = Rotation(None, None, True)
    if rope is not None:
        cos, sin = there.ops.rope_angles(np.arange(N_POSITIONS), ROPE)
        rotation = Rotation(cos[:, 0].copy(), sin[:, 0].copy(), rope == "neox")
    places = (there.put(positions), there.put(tables))
    of_heads: dict[str, Any] = {"norms": tuple(there.put(weight) for weight in weights), "eps": EPS}
    of_heads["q_factor"] = q_factor
    fill_cache()
    rotated = xp.zeros((n + 1, n_head, head_dim), xp.float32)
    given = (projections, rotation, *places)
    rope_append(there.ops.kernels, *given, rotated, cache.k[0], cache.v[0], **of_heads)
    found_q, appended = to_numpy(rotated).copy(), [to_numpy(array).copy() for array in cached]
    assert not found_q[n].any()
    fill_cache()
    division = attention_step.step_division(n + 1, n_head, cache.k[0], tables, window)
    partial = xp.full((n + 1, n_head, division.n_entries, head_dim + 2), xp.nan, xp.float32)
    y, arrived = xp.zeros((n + 1, n_q), xp.float32), xp.zeros(attention_step.counters_of(n + 1, n_head), xp.int32)
    kernels = ForPlans(there.ops.kernels) if for_plan else there.ops.kernels
    attention_step.attention_step(
        kernels,
        *given,
        cache.k[0],
        cache.v[0],
        partial,
        arrived,
        y,
        scale=0.125,
        window=window,
        sinks=there.put(of_sinks),
        **of_heads,
    )
    found, written = to_numpy(y).copy(), [to_numpy(array).copy() for array in cached]
    assert not found[n].any()
    assert not to_numpy(arrived).any()

    q, k, v = q[:n], k[:n], v[:n]
    if norms:
        q, k = there.rms_norm(q, weights[0], EPS), there.rms_norm(k, weights[1], EPS)
    batch = cache.batch([(s, [0]) for s in sequences])
    if rope is not None:
        angles = there.ops.rope_angles(batch.positions, ROPE)
        rotate = there.ops.rope_neox if rope == "neox" else there.ops.rope_norm
        q, k = to_numpy(rotate(there.put(q), angles)), to_numpy(rotate(there.put(k), angles))
    if q_factor != 1.0:
        q = q * np.float32(q_factor)
    fill_cache()
    there.kv_append(cache.k[0], k, batch.slots)
    there.kv_append(cache.v[0], v, batch.slots)
    for ours, too, now in zip(written, appended, cached, strict=True):
        for was in (ours, too):
            np.testing.assert_array_equal(was.view(np.uint8), to_numpy(now).view(np.uint8))
    options = {"probe": lambda name, x: x, "scale": 0.125, "window": window, "sinks": of_sinks}
    wanted = there.attention(q, cache.k[0], cache.v[0], batch, **options)
    assert np.isfinite(wanted).all() != nan
    for was, now in ((found[:n], wanted), (found_q[:n], q)):
        bits, wanted_bits = (np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32) for x in (was, now))
        np.testing.assert_array_equal(bits, wanted_bits)


@pytest.mark.parametrize(
    ("heads", "lengths", "options"),
    [
        ((4, 2, 32), MIXED, {}),
        ((3, 3, 40), MIXED, {"rope": "norm", "sinks": True}),
        ((17, 1, 64), MIXED, {"window": 600, "sinks": True}),
        ((4, 1, 96), MIXED, {"window": 16, "q_factor": 0.1}),
        ((2, 1, 128), MIXED, {"norms": True, "fused": True}),
        ((2, 2, 64), MIXED, {"rope": None, "fused": True}),
        ((7, 1, 64), SHORT, {"nan": True}),
        ((2, 2, 96), SHORT, {"q_factor": 0.1, "block_size": 128}),
        ((20, 1, 80), SHORT, {"rope": "norm", "norms": True, "sinks": True, "window": 65}),
        ((8, 1, 128), LONG, {"nan": True}),
        ((1, 1, 8), LONG, {"rope": None, "norms": True, "sinks": True, "window": 513}),
        ((2, 1, 48), (1500, 1536), {"rope": "norm"}),
        ((7, 1, 64), PAIRS, {"nan": True, "sinks": True}),
        ((9, 3, 72), PAIRS, {"window": 129, "block_size": 256}),
        ((2, 1, 64), PAIRS, {"window": 1}),
        ((3, 1, 128), LIMITS, {"sinks": True}),
        ((1, 1, 96), LIMITS, {"window": 300}),
        ((8, 1, 32), LIMITS, {"window": 640, "nan": True}),
        ((5, 1, 64), LIMITS, {"window": 1300, "sinks": True}),
    ],
)
@pytest.mark.parametrize(("share", "most_quads"), [(1, 16), (2, 16), (3, 16), (99, 16), (99, 3)])
def test_attention_of_a_step(
    heads: tuple[int, int, int],
    lengths: tuple[int, ...],
    options: dict[str, Any],
    share: int,
    most_quads: int,
    there: OpsThere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """share: how many blocks there may be for the same rows. Rows of several splits and up to `share` and most_quads
    quads of tiles are divided into quads, unless share is 1; others into splits."""
    n_head, n_head_kv, _ = heads
    n_blocks = (len(lengths) + 1) * n_head_kv * attention_step.step_blocks(n_head // n_head_kv)
    monkeypatch.setattr(attention_step, "BUSY", share * n_blocks)
    monkeypatch.setattr(attention_step, "MOST_QUADS", most_quads)
    check_attention_of_a_step(there, heads, lengths, **options)


@pytest.mark.parametrize("block_size", [64, 256])
def test_how_a_step_divides_positions(block_size: int) -> None:
    cache = PagedRows(np.zeros((1, 2, block_size, 64), np.float16), np.zeros((1, 2, block_size), np.uint8))

    def division(n: int, n_positions: int, window: int = 0) -> tuple[int, int, int]:
        found = attention_step.step_division(n, 14, cache, np.zeros((n, n_positions // block_size), np.int32), window)
        return found.at_once, found.most_quads, found.n_entries

    assert division(1, 256) == (1, 0, 1)
    assert division(1, 1024) == (4, 4, 16)
    assert division(1, 8192) == (16, 4, 16)
    assert division(1, 131072) == (132, 4, 256)
    assert division(8, 8192) == (16, 4, 16)
    assert division(33, 8192) == (4, 4, 16)
    assert division(33, 512) == (1, 0, 1)
    assert division(66, 8192) == (2, 2, 16)
    assert division(67, 8192) == (1, 0, 16)
    assert division(67, 256) == (1, 0, 1)
    assert division(1, 131072, window=128) == (2, 2, 8)
    assert division(1, 131072, window=513) == (3, 3, 12)
    assert division(1, 131072, window=1) == (1, 0, 1)
    assert division(67, 131072, window=513) == (1, 0, 2)
    most = 0
    for n in range(1, 133):  # up to so many rows, quads are divided; the work space is bounded for any number
        for n_positions in (256, 4096, 131072):
            at_once, most_quads, n_entries = division(n, n_positions)
            assert 2 * n * at_once <= attention.BUSY
            assert n_entries == max(4 * most_quads, n_positions // attention.SPLIT or 1)
            most = max(most, n * 4 * most_quads)
    assert most <= 2 * attention.BUSY


@pytest.mark.parametrize("order", [1, 5])
def test_attention_of_a_step_with_threads_in_another_order(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    there = OpsThere("host")
    module = there.ops.kernels.module("attention_step")
    monkeypatch.setattr(module, "launch", partial(module.launch, order=order))
    check_attention_of_a_step(there, (10, 1, 64), MIXED, norms=True, sinks=True)
    check_attention_of_a_step(there, (2, 2, 96), SHORT, window=100)
    monkeypatch.setattr(attention_step, "MOST_QUADS", 3)
    check_attention_of_a_step(there, (2, 1, 64), LIMITS, window=700)


@pytest.mark.parametrize(
    ("heads", "lengths", "options"),
    [
        ((7, 1, 64), MIXED, {"sinks": True, "window": 600}),
        ((4, 2, 32), SHORT, {"rope": "norm", "norms": True, "fused": True}),
        ((2, 2, 96), LIMITS, {"q_factor": 0.1, "block_size": 128}),
        ((9, 1, 128), (1500,), {"rope": None, "nan": False}),
    ],
)
def test_a_kernel_for_one_plan_gives_the_same_attention(
    heads: tuple[int, int, int], lengths: tuple[int, ...], options: dict[str, Any], there: OpsThere
) -> None:
    check_attention_of_a_step(there, heads, lengths, for_plan=True, **options)


def test_the_kernels_read_the_fields_of_a_plan_in_their_order() -> None:
    for parameters in read_source("attention_step").kernels.values():
        (plan,) = (parameter for parameter in parameters if parameter.kind == "Plan")
        assert [member.name for member in plan.members] == [field.name for field in fields(attention_step.Plan)]
