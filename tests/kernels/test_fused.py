"""Fused kernels, one by one, are the chains that they stand for, bit for bit; every access is checked."""

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.cuda.kernels import matmul, moe, norm
from refengine.cuda.kernels.moe import Groups
from refengine.cuda.kernels.quantize_rows import Converted, Rows, quantize_rows
from refengine.cuda.layout import PackedMatrix
from refengine.trace import to_numpy
from tests.kernels.op_twins import OpsThere

EPS = 1e-5


def empty_rows(there: OpsThere, n: int, width: int, *, floats: bool, halves: bool | None) -> Rows:
    plain = there.xp.zeros((n, width), there.xp.float32) if floats else None
    return Rows(n, plain, None if halves is None else Converted.empty(there.xp, n, width, halves=halves))


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_embd", [32, 96, 608])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_norm_and_its_converted_rows(n_embd: int, halves: bool, with_bias: bool, there: OpsThere) -> None:
    n, kernels = 5, there.ops.kernels
    x = random(n, n_embd) * np.array([1, 1e6, 1e-6, 0, 1], np.float32)[:, None]
    x[4, 3] = np.nan
    weight, bias = random(n_embd, seed=2), random(n_embd, seed=3)
    rows = empty_rows(there, n, n_embd, floats=True, halves=halves)
    floats_only = empty_rows(there, n, n_embd, floats=True, halves=None)
    vectors = [there.put(weight), there.put(bias)] if with_bias else [there.put(weight)]
    launch: Callable[..., None] = norm.layer_norm_rows if with_bias else norm.rms_norm_rows
    for given in (rows, floats_only):
        launch(kernels, there.put(x), *vectors, EPS, given)
    expected = there.layer_norm(x, weight, bias, EPS) if with_bias else there.rms_norm(x, weight, EPS)
    for given in (rows, floats_only):
        assert given.floats is not None
        np.testing.assert_array_equal(to_numpy(given.floats), expected)
    alone = Converted.empty(there.xp, n, n_embd, halves=halves)
    quantize_rows(kernels, Rows(len(expected), there.put(expected)), alone)
    assert rows.converted is not None
    for name in ("data", "scale") if halves else ("data", "scale", "sums"):
        np.testing.assert_array_equal(to_numpy(getattr(rows.converted, name)), to_numpy(getattr(alone, name)))


def test_experts_of_rows_that_are_there(there: OpsThere) -> None:
    positions = np.array([0, -1, 3, 5, -1, 2, 1, 1, 8], np.int32)
    x, w, bias = random(9, 96), random(6, 96, seed=2), random(6, seed=3)
    router = PackedMatrix("router", GGMLQuantizationType.F32, (6, 96), there.put(w.reshape(-1).view(np.uint8)))
    xp, kernels = there.xp, there.ops.kernels
    routed, shares = xp.zeros((9, 6), xp.float32), xp.zeros((9, 3), xp.float32)
    matmul.linear(kernels, Rows(9, there.put(x)), router, routed, bias=there.put(bias), overlap=True)
    of_rows = xp.zeros((9, 3), xp.int32)
    moe.route(kernels, routed, there.put(positions), of_rows, shares)
    slots = [xp.zeros(27, xp.int32) for _ in range(2)]
    experts = Groups(xp.zeros((moe.most_groups(27, 6, 8), 3), xp.int32), slots[0], slots[1], 8)
    moe.group_experts(kernels, of_rows, 6, 3, experts, overlap=True)
    active = positions >= 0
    scores = to_numpy(there.ops.linear(there.put(x), router, there.put(bias)))
    chosen = there.top_experts(scores, 3)
    expected = there.row_soft_max(np.take_along_axis(scores, chosen, axis=-1))
    np.testing.assert_array_equal(to_numpy(shares)[active], expected[active])
    pairs, groups = to_numpy(experts.y_rows), to_numpy(experts.group)
    reached: list[tuple[int, int]] = []
    for expert, first, count in groups[groups[:, 2] > 0].tolist():
        assert count <= 8
        reached += [(pair, expert) for pair in pairs[first : first + count].tolist()]
    rows = np.flatnonzero(active).tolist()
    assert sorted(reached) == [(row * 3 + k, int(chosen[row, k])) for row in rows for k in range(3)]

    residual, down = random(9, 96, seed=4), random(9, 3, 96, seed=5)
    y = there.put(np.zeros((9, 96), np.float32))
    moe.combine(kernels, there.put(down.reshape(27, 96)), there.put(expected), there.put(residual), y)
    wanted = there.sum_experts(down * expected[:, :, None]) + residual
    np.testing.assert_array_equal(to_numpy(y), wanted)
