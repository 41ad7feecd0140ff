"""Kernels of the mixture of experts, and products with experts' matrices, against their NumPy twins."""

import numpy as np
import pytest

from refengine.cuda.kernels.moe import Groups, group_experts, most_groups
from refengine.errors import KernelError
from refengine.ops import moe
from refengine.trace import to_numpy
from tests.kernels.matrices import random_matrix
from tests.kernels.op_twins import OpsThere
from tests.kernels.runner import Kernels

EPS = 2.0**-24


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


@pytest.mark.parametrize(("n_expert", "n_used"), [(4, 2), (32, 4), (33, 33), (1, 1)])
def test_experts_are_chosen_as_by_the_twin(n_expert: int, n_used: int, there: OpsThere) -> None:
    rng = np.random.default_rng(n_expert)
    scores = rng.integers(-3, 3, (20, n_expert)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(there.top_experts(scores, n_used), moe.top_experts(np, scores, n_used))
    scores[3, n_expert // 2] = np.nan
    assert there.top_experts(scores, n_used)[3, 0] == n_expert // 2  # not lost


def test_soft_max_and_sum_are_their_twins(there: OpsThere) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((9, 4)) * 10).astype(np.float32)
    expected = moe.row_soft_max(np, x.astype(np.float64))
    np.testing.assert_allclose(there.row_soft_max(x), expected, rtol=60 * EPS)  # e^x of an x rounded at 30
    experts = rng.standard_normal((5, 3, 40)).astype(np.float32)
    np.testing.assert_array_equal(there.sum_experts(experts), moe.sum_experts(experts))


def expected_groups(chosen: np.ndarray, n_expert: int, n_groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups, and the pair of each slot, by a plain loop."""
    groups: list[tuple[int, int, int]] = []
    pairs: list[int] = []
    for expert in range(n_expert):
        own = np.flatnonzero(chosen == expert).tolist()
        groups += [(expert, len(pairs) + i, min(size, len(own) - i)) for i in range(0, len(own), size)]
        pairs += own
    return np.array(groups + [(0, 0, 0)] * (n_groups - len(groups)), np.int32), np.array(pairs, np.int32)


@pytest.mark.parametrize(
    ("n_pairs", "n_expert", "size", "share"),
    [(1, 3, 8, 1), (8, 32, 8, 4), (250, 7, 8, 1), (8192, 32, 64, 4), (4100, 256, 8, 2), (9000, 2, 64, 8)],
)
@pytest.mark.parametrize("kind", ["even", "one expert", "absent rows"])
def test_pairs_are_grouped_by_expert_in_ascending_order(
    n_pairs: int, n_expert: int, size: int, share: int, kind: str, there: OpsThere
) -> None:
    rng = np.random.default_rng(n_pairs)
    chosen = rng.integers(0, n_expert, n_pairs).astype(np.int32)
    if kind == "one expert":
        chosen[:] = n_expert - 1
    if kind == "absent rows":
        chosen[rng.random(n_pairs) < 0.4] = -1
    n_groups = most_groups(n_pairs, n_expert, size)
    xp = there.xp
    slots = [xp.full(n_pairs, -7, xp.int32) for _ in range(2)]
    groups = Groups(xp.full((n_groups, 3), -7, xp.int32), slots[0], slots[1], size)
    group_experts(there.ops.kernels, there.put(chosen), n_expert, share, groups)
    expected, pairs = expected_groups(chosen, n_expert, n_groups, size)
    np.testing.assert_array_equal(to_numpy(groups.group), expected)
    unused = np.full(n_pairs - len(pairs), -7)
    np.testing.assert_array_equal(to_numpy(groups.y_rows), [*pairs, *unused])
    np.testing.assert_array_equal(to_numpy(groups.x_rows), [*(pairs // share), *unused])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("warps", [1, 3])
def test_groups_do_not_depend_on_the_order_or_number_of_threads(order: int, warps: int, place: str) -> None:
    if place == "cuda":
        pytest.skip("threads run in an order of their own there")
    n_pairs, n_expert, size = 1500, 5, 8
    chosen = np.random.default_rng(2).integers(-1, n_expert, n_pairs).astype(np.int32)
    n_groups = most_groups(n_pairs, n_expert, size)
    groups, x_rows, y_rows = np.zeros((n_groups, 3), np.int32), np.zeros(n_pairs, np.int32), np.zeros(n_pairs, np.int32)
    arguments = [chosen, groups, x_rows, y_rows, n_pairs, n_expert, n_groups, size, 4]
    Kernels("moe", place).launch("group_experts", (n_expert,), (32 * warps,), arguments, 4 * n_expert, order=order)
    expected, pairs = expected_groups(chosen, n_expert, n_groups, size)
    np.testing.assert_array_equal(groups, expected)
    np.testing.assert_array_equal(y_rows[: len(pairs)], pairs)


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "Q4_1", "F32", "BF16", "F16"])
@pytest.mark.parametrize("n_tokens", [1, 3, 70])
@pytest.mark.parametrize("shared", [True, False])
def test_experts_products_are_rows_of_plain_ones_bit_for_bit(
    kind: str, n_tokens: int, shared: bool, there: OpsThere
) -> None:
    rng = np.random.default_rng(2)
    n_expert, n_used, n_out, n_in = 5, 2, 24, 288
    w = random_matrix(kind, (n_expert, n_out, n_in), 3)
    x = rng.standard_normal((n_tokens, 1 if shared else n_used, n_in)).astype(np.float32)
    chosen = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_tokens)]).astype(np.int32)
    if n_tokens == 70:
        chosen[:, 0] = np.where(chosen[:, 1] == 4, 3, 4)  # more than one group of one expert
    packed = there.matrix(w)
    y = there.linear_experts(x, packed, there.put(chosen))
    assert y.shape == (n_tokens, n_used, n_out)
    rows = np.broadcast_to(x, (n_tokens, n_used, n_in))
    for expert in range(n_expert):
        token, rank = np.nonzero(chosen == expert)
        if not len(token):
            continue
        part = type(w)(w.name, w.type, (n_out, n_in), w.rows(expert * n_out, (expert + 1) * n_out))
        plain = there.linear(np.ascontiguousarray(rows[token, rank]), there.matrix(part))
        np.testing.assert_array_equal(y[token, rank], plain)


def test_what_does_not_fit_is_refused_and_names_the_tensor(there: OpsThere) -> None:
    w = there.matrix(random_matrix("Q8_0", (16, 64), 1))
    with pytest.raises(KernelError, match=r"random Q8_0: a matrix \(16, 64\) cannot multiply rows \(2, 32\)"):
        there.linear(np.zeros((2, 32), np.float32), w)
    with pytest.raises(KernelError, match=r"random Q8_0: rows 2 to 16 were requested, it has 16"):
        there.embedding(w, np.array([2, 16]))
    with pytest.raises(KernelError, match="at most 32"):
        there.row_soft_max(np.zeros((1, 33), np.float32))
    with pytest.raises(KernelError, match="5 of 4 experts"):
        there.top_experts(np.zeros((1, 4), np.float32), 5)
