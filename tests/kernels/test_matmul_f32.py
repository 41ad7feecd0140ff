"""Products with F32 and BF16 weights, and their rows, against float64."""

import numpy as np
import pytest

from refengine import quants
from tests.kernels.matrices import random_matrix
from tests.kernels.op_twins import OpsThere

EPS = 2.0**-24  # float32, half a unit in the last place


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("n_in", [96, 172])
def test_float_products_are_within_float32(kind: str, n_in: int, there: OpsThere) -> None:
    rng = np.random.default_rng(5)
    w = random_matrix(kind, (19, n_in), 4)
    x = rng.standard_normal((11, n_in)).astype(np.float32) * np.float32(1e6)
    bias = rng.standard_normal(19).astype(np.float32)
    packed = there.matrix(w)
    y = there.linear(x, packed, there.put(bias))
    assert isinstance(w.data, np.ndarray)
    values = quants.dequantize(np, w.data, w.type, w.shape).astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(values).T + np.abs(bias)
    # n_in / 32 fused multiply-adds in a lane, five levels of the tree, the bias.
    assert (np.abs(y - (x.astype(np.float64) @ values.T + bias)) <= (n_in / 32 + 7) * EPS * magnitude).all()
    for rows in ([4], [10, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]):
        np.testing.assert_array_equal(there.linear(np.ascontiguousarray(x[rows]), packed, there.put(bias)), y[rows])
    ids = np.array([3, 0, 18, 3])
    np.testing.assert_array_equal(there.embedding(packed, ids), values[ids].astype(np.float32))
