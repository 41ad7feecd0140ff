"""The router in one launch is the norm, the product, the choice and the groups one after another, bit for bit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.cuda.kernels import matmul, moe, norm, router
from refengine.cuda.kernels.moe import Groups, most_groups
from refengine.cuda.kernels.norm import norm_bytes
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.layout import PackedMatrix
from refengine.trace import to_numpy
from tests.kernels.matrices import random_matrix
from tests.kernels.op_twins import OpsThere
from tests.kernels.runner import Kernels

EPS = 1e-5
SIZE = 8  # of groups


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


@dataclass(frozen=True)
class Result:
    """What a router gives; slots that no group has are zero."""

    scores: np.ndarray
    shares: np.ndarray
    group: np.ndarray
    x_rows: np.ndarray
    y_rows: np.ndarray

    def check(self, expected: "Result", positions: np.ndarray) -> None:
        exists = positions >= 0
        np.testing.assert_array_equal(self.scores, expected.scores)
        np.testing.assert_array_equal(self.shares[exists], expected.shares[exists])
        for name in ("group", "x_rows", "y_rows"):
            np.testing.assert_array_equal(getattr(self, name), getattr(expected, name), err_msg=name)


def outputs(there: OpsThere, n: int, n_expert: int, n_used: int) -> tuple[Any, Any, Groups]:
    xp, n_pairs = there.xp, n * n_used
    slots = [xp.zeros(n_pairs, xp.int32) for _ in range(2)]
    group = xp.full((most_groups(n_pairs, n_expert, SIZE), 3), -7, xp.int32)
    return (
        xp.zeros((n, n_expert), xp.float32),
        xp.zeros((n, n_used), xp.float32),
        Groups(group, slots[0], slots[1], SIZE),
    )


def result(scores: Any, shares: Any, groups: Groups) -> Result:
    return Result(*(to_numpy(a).copy() for a in (scores, shares, groups.group, groups.x_rows, groups.y_rows)))


def one_after_another(
    there: OpsThere, x: Any, weight: Any, w: PackedMatrix, bias: Any, positions: Any, n_used: int
) -> Result:
    kernels, xp, n, n_expert = there.ops.kernels, there.xp, len(x), w.shape[0]
    scores, shares, groups = outputs(there, n, n_expert, n_used)
    if weight is not None:
        y = xp.zeros(x.shape, xp.float32)
        norm.rms_norm(kernels, x, weight, EPS, y)
        x = y
    matmul.linear(kernels, Rows(n, x), w, scores, bias=bias)
    chosen = xp.zeros((n, n_used), xp.int32)
    moe.route(kernels, scores, positions, chosen, shares)
    moe.group_experts(kernels, chosen, n_expert, n_used, groups)
    return result(scores, shares, groups)


def in_one(
    there: OpsThere, x: Any, weight: Any, w: PackedMatrix, bias: Any, positions: Any, n_used: int, counter: Any
) -> Result:
    scores, shares, groups = outputs(there, len(x), w.shape[0], n_used)
    router.route(there.ops.kernels, x, weight, EPS, w, bias, positions, counter, scores, shares, groups)
    return result(scores, shares, groups)


@pytest.mark.parametrize(
    ("kind", "n_rows", "n_expert", "n_used", "n_in"),
    [
        ("F32", 1, 32, 4, 2880),
        ("F32", 3, 5, 3, 68),
        ("BF16", 8, 40, 8, 136),
        ("F32", 32, 32, 4, 96),
        ("BF16", 4, 128, 32, 64),
        ("F32", 9, 1, 1, 4),
    ],
)
@pytest.mark.parametrize("parts", ["norm and bias", "bias", "norm"])
def test_one_launch_is_the_chain_that_it_stands_for(
    kind: str, n_rows: int, n_expert: int, n_used: int, n_in: int, parts: str, there: OpsThere
) -> None:
    rng = np.random.default_rng(n_rows)
    w = there.matrix(random_matrix(kind, (n_expert, n_in), 3))
    x = (rng.standard_normal((n_rows, n_in)) * 100).astype(np.float32)
    weight = rng.standard_normal(n_in).astype(np.float32) if "norm" in parts else None
    bias = rng.standard_normal(n_expert).astype(np.float32) if "bias" in parts else None
    positions = np.arange(n_rows, dtype=np.int32)
    positions[1::3] = -1
    given = (there.put(x), there.put(weight), w, there.put(bias), there.put(positions), n_used)
    expected = one_after_another(there, *given)
    counter = there.xp.zeros(1, there.xp.int32)
    for _ in range(2):  # the second launch finds the counter as the first left it
        in_one(there, *given, counter).check(expected, positions)
        assert int(counter[0]) == 0


@pytest.mark.parametrize("n_multiprocessors", [1, 100])
def test_experts_are_spread_over_as_many_blocks_as_there_is_room_for(
    n_multiprocessors: int, there: OpsThere, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    w = there.matrix(random_matrix("F32", (19, 64), 3))
    x, positions = rng.standard_normal((2, 64)).astype(np.float32), np.zeros(2, np.int32)
    given = (there.put(x), None, w, None, there.put(positions), 4)
    expected = one_after_another(there, *given)
    monkeypatch.setitem(there.ops.kernels.__dict__, "n_multiprocessors", n_multiprocessors)
    in_one(there, *given, there.xp.zeros(1, there.xp.int32)).check(expected, positions)


def test_ties_and_nan_are_ranked_as_by_the_chain(there: OpsThere) -> None:
    n_expert, n_in = 12, 32
    matrix = random_matrix("F32", (n_expert, n_in), 3)
    rows = np.zeros((n_expert, n_in), np.float32)
    rows[::3, 0], rows[1::3, 0] = 2.0, -0.0  # with the zeros, many ties
    w = there.matrix(type(matrix)("router", matrix.type, (n_expert, n_in), rows.reshape(-1).view(np.uint8)))
    x = np.ones((5, n_in), np.float32)
    x[1] = -1.0
    x[2, 0] = np.nan
    bias = np.zeros(n_expert, np.float32)
    bias[7] = np.nan
    positions = np.array([4, 0, 1, -1, 2], np.int32)
    for of_bias in (None, bias):
        given = (there.put(x), None, w, there.put(of_bias), there.put(positions), 5)
        found = in_one(there, *given, there.xp.zeros(1, there.xp.int32))
        found.check(one_after_another(there, *given), positions)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_order_of_threads_does_not_matter(order: int, place: str) -> None:
    if place == "cuda":
        pytest.skip("threads run in an order of their own there")
    module = Kernels("router", place)
    rng = np.random.default_rng(4)
    n, n_in, n_expert, n_used, each = 3, 300, 17, 4, 2
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((n_expert, n_in), (n, n_in)))
    weight, bias = (rng.standard_normal(size).astype(np.float32) for size in (n_in, n_expert))
    found = []
    for turn in (0, order):
        n_groups = most_groups(n * n_used, n_expert, SIZE)
        integers = [np.zeros(1, np.int32), np.zeros((n_groups, 3), np.int32)]
        slots = [np.zeros(n * n_used, np.int32) for _ in range(2)]
        scores, shares = np.zeros((n, n_expert), np.float32), np.zeros((n, n_used), np.float32)
        given = [w, x, weight, bias, np.array([0, -1, 1], np.int32), scores, integers[0], shares, integers[1], *slots]
        sizes = [n_in, n_expert, n_used, n_groups, SIZE, each, EPS]
        module.launch(
            "router_f32", (9, n), (256,), [*given, *sizes], 4 * n_in * (each + 2) + norm_bytes(n_in), order=turn
        )
        assert not integers[0].any()
        found.append((scores, shares, integers[1], *slots))
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("kind", "n_in", "n_rows", "n_used", "fits"),
    [
        ("F32", 2880, 32, 4, True),
        ("F32", 2880, 33, 4, False),  # more pairs than threads
        ("F32", 2882, 1, 4, False),  # rows that are no multiple of 16 bytes
        ("BF16", 2884, 1, 4, False),
        ("BF16", 2888, 1, 4, True),
        ("F32", 16384, 1, 4, False),  # does not fit into shared memory
        ("Q8_0", 2880, 1, 4, False),
        ("F32", 2880, 1, 33, False),
    ],
)
def test_what_the_router_supports(kind: str, n_in: int, n_rows: int, n_used: int, fits: bool) -> None:
    w = PackedMatrix("router", GGMLQuantizationType[kind], (64, n_in), np.empty(0, np.uint8))
    assert router.fits(w, n_rows, n_used) == fits
