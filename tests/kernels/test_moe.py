"""Kernels of the mixture of experts, and products with experts' matrices, against their NumPy twins."""

import numpy as np
import pytest

from refengine.errors import KernelError
from refengine.ops import moe
from tests.kernels.matrices import random_matrix
from tests.kernels.op_twins import OpsThere

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
