"""Kernels of the decode step, one by one, are the chains that they stand for, bit for bit; every access is checked."""

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.cache.paged import CacheSequence
from refengine.config import ModelConfig, RopeConfig
from refengine.cuda.decode import ops as fused
from refengine.cuda.decode.buffers import QKV, Rows
from refengine.cuda.decode.ops import FusedOps
from refengine.cuda.layout import PackedMatrix
from refengine.trace import to_numpy
from tests.kernels.op_twins import OpsThere

ROPE = RopeConfig(n_rot=24, freq_base=1e4, freq_scale=1.0, n_ctx_orig=4096, ext_factor=0.0, attn_factor=1.0)


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


def config(**sizes: Any) -> ModelConfig:
    given = {"n_layer": 1, "n_embd": 96, "n_head": 2, "n_head_kv": 2, "head_dim": 32, "n_ff": 96, "rope": ROPE}
    given |= {"arch": "llama", "name": "", "n_vocab": 64, "n_ctx_train": 4096, "norm_eps": 1e-5}
    return ModelConfig(**(given | sizes))


def matrix(kind: str) -> Any:
    return PackedMatrix("w", GGMLQuantizationType[kind], (1, 1), {})


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_embd", [32, 96, 608])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_norm_and_its_halves(n_embd: int, with_bias: bool, there: OpsThere) -> None:
    n = 5
    cache = there.cache(2, 32, 2)
    ops = FusedOps(there.ops, config(n_embd=n_embd), cache, n, None)
    x = random(n, n_embd) * np.array([1, 1e6, 1e-6, 0, 1], np.float32)[:, None]
    x[4, 3] = np.nan
    weight, bias = random(n_embd, seed=2), random(n_embd, seed=3)
    if with_bias:
        expected = there.layer_norm(x, weight, bias, 1e-5)
        rows = ops.layer_norm(there.put(x), there.put(weight), there.put(bias), [matrix("F32"), matrix("Q8_0")])
    else:
        expected = there.rms_norm(x, weight, 1e-5)
        rows = ops.rms_norm(there.put(x), there.put(weight), [matrix("F32"), matrix("Q8_0")])
    np.testing.assert_array_equal(to_numpy(rows.floats), expected)
    alone = there.ops._activations(there.put(expected))
    for found, wanted in zip(rows.prepared(), (alone.halves, alone.sums, alone.scale), strict=True):
        np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))
    floats_only = ops.rms_norm(there.put(x), there.put(weight), [matrix("BF16")])
    assert floats_only.halves is None


LENGTHS = (1, 700, 64, 1100, 513)  # positions, the new one included


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim", "window", "options"),
    [
        (4, 2, 32, 0, {"neox": True}),
        (3, 3, 40, 0, {"neox": False, "sinks": True}),
        (17, 1, 64, 600, {"neox": True, "sinks": True}),
        (4, 1, 96, 16, {"neox": True, "q_factor": 0.1}),
        (2, 1, 128, 0, {"neox": True, "norms": True, "fused": True}),
        (2, 2, 64, 0, {"rope": False, "fused": True}),
    ],
)
@pytest.mark.parametrize("busy", [1, 264])
def test_rope_append_and_attention(
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    window: int,
    options: dict[str, Any],
    busy: int,
    there: OpsThere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """busy: how many blocks there are to be, and so whether one takes several splits."""
    monkeypatch.setattr(fused, "BUSY", busy)
    n, rng = len(LENGTHS), np.random.default_rng(head_dim)
    cfg = config(
        n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim, rope=ROPE if options.get("rope", True) else None
    )
    n_blocks = sum(-(-length // 64) for length in LENGTHS)
    cache = there.cache(n_head_kv, head_dim, n_blocks)
    take = iter(rng.permutation(n_blocks).tolist())
    cache.pool.allocate = lambda n: [next(take) for _ in range(n)]  # type: ignore[method-assign]
    for kv in (cache.k[0], cache.v[0]):
        kv.values[...] = there.put(rng.standard_normal(kv.values.shape).astype(np.float16))
        kv.exponents[...] = there.put(rng.integers(120, 134, kv.exponents.shape).astype(np.uint8))
    sequences = [CacheSequence() for _ in LENGTHS]
    cache.batch([(s, [0] * length) for s, length in zip(sequences, LENGTHS, strict=True)])
    for s, length in zip(sequences, LENGTHS, strict=True):
        s.length = length - 1
    ops = FusedOps(there.ops, cfg, cache, n + 1, None)  # the last row is not there
    tables = np.zeros((n + 1, ops.table_stride), np.int32)
    for i, s in enumerate(sequences):
        tables[i, : len(s.block_table)] = s.block_table
    ops.positions[...] = there.put(np.array([*(s.length for s in sequences), -1], np.int32))
    ops.tables[...] = there.put(tables)

    q, k, v = (random(n + 1, heads, head_dim, seed=i) for i, heads in enumerate((n_head, n_head_kv, n_head_kv)))
    k[1] *= 1e6
    parts = [there.put(np.ascontiguousarray(part).reshape(-1)) for part in (q, k, v)]
    strides = (cfg.n_embd_q, cfg.n_embd_kv, cfg.n_embd_kv)
    if options.get("fused"):
        whole = there.put(np.concatenate([part.reshape(n + 1, -1) for part in (q, k, v)], axis=1).reshape(-1))
        parts = [whole, whole[cfg.n_embd_q :], whole[cfg.n_embd_q + cfg.n_embd_kv :]]
        strides = (sum(strides),) * 3
    norms = [random(head_dim, seed=8), random(head_dim, seed=9)] if options.get("norms") else [None, None]
    sinks = random(n_head, seed=7) if options.get("sinks") else None
    q_factor = options.get("q_factor", 1.0)
    heads = ops.attention(
        0,
        QKV((parts[0], parts[1], parts[2]), strides),
        scale=0.125,
        neox=options.get("neox", True),
        norms=(there.put(norms[0]), there.put(norms[1])),
        q_factor=q_factor,
        window=window,
        sinks=there.put(sinks),
    )
    found = to_numpy(heads)[:n].copy()
    written = [to_numpy(a).copy() for kv in (cache.k[0], cache.v[0]) for a in (kv.values, kv.exponents)]

    q, k, v = q[:n], k[:n], v[:n]
    if norms[0] is not None:
        q, k = there.rms_norm(q, norms[0], 1e-5), there.rms_norm(k, norms[1], 1e-5)
    batch = cache.batch([(s, [0]) for s in sequences])
    if cfg.rope is not None:
        angles = there.ops.rope_angles(batch.positions, cfg.rope)
        rope = there.ops.rope_neox if options["neox"] else there.ops.rope_norm
        q, k = to_numpy(rope(there.put(q), angles)), to_numpy(rope(there.put(k), angles))
    if q_factor != 1.0:
        q = q * np.float32(q_factor)
    there.kv_append(cache.k[0], k, batch.slots)
    there.kv_append(cache.v[0], v, batch.slots)
    for was, now in zip(
        written, (a for kv in (cache.k[0], cache.v[0]) for a in (kv.values, kv.exponents)), strict=True
    ):
        np.testing.assert_array_equal(was.view(np.uint8), to_numpy(now).view(np.uint8))
    given = {"scale": 0.125, "probe": lambda name, x: x, "window": window, "sinks": sinks}
    np.testing.assert_array_equal(found, there.attention(q, cache.k[0], cache.v[0], batch, **given))


def test_experts_of_rows_that_are_there(there: OpsThere) -> None:
    cfg = config(n_expert=6, n_expert_used=3, n_ff_exp=32)
    ops = FusedOps(there.ops, cfg, there.cache(2, 32, 2), 9, None)
    positions = np.array([0, -1, 3, 5, -1, 2, 1, 1, 8], np.int32)
    ops.positions[...] = there.put(positions)
    x, w, bias = random(9, 96), random(6, 96, seed=2), random(6, seed=3)
    router = PackedMatrix("router", GGMLQuantizationType.F32, (6, 96), {"low": there.put(w.reshape(-1).view(np.uint8))})
    rows = Rows(9, there.put(x), None, None, None)
    experts, shares = ops.route(rows, router, there.put(bias))
    active = positions >= 0
    scores = to_numpy(there.ops.linear(there.put(x), router, there.put(bias)))
    chosen = there.top_experts(scores, 3)
    expected = there.row_soft_max(np.take_along_axis(scores, chosen, axis=-1))
    np.testing.assert_array_equal(to_numpy(shares)[active], expected[active])
    pairs, groups = to_numpy(experts.pairs), to_numpy(experts.groups)
    reached: list[tuple[int, int]] = []
    for expert, first, count in groups[groups[:, 2] > 0].tolist():
        assert count <= 8
        reached += [(pair, expert) for pair in pairs[first : first + count].tolist()]
    assert sorted(reached) == [(row * 3 + k, chosen[row, k]) for row in np.flatnonzero(active) for k in range(3)]

    residual, down = random(9, 96, seed=4), random(9, 3, 96, seed=5)
    y = there.put(np.zeros((9, 96), np.float32))
    sizes = [np.int32(3), np.int32(96)]
    arguments = [there.put(down), there.put(expected), there.put(residual), y, *sizes]
    there.ops.kernels.launch("moe", "combine_f32", (1, 9), 256, arguments)
    wanted = there.sum_experts(down * expected[:, :, None]) + residual
    np.testing.assert_array_equal(to_numpy(y), wanted)
