"""Products with F32 and BF16 weights, and their rows, against float64."""

import numpy as np
import pytest

from refengine import quants
from refengine.cuda.kernels import matmul
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.trace import to_numpy
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


def in_order(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The documented order of additions. x (n, n_in), w (n_out, n_in): products are exact, so that only sums round."""
    lanes = np.zeros((len(x), len(w), 32), np.float32)
    for k in range(x.shape[1]):
        lanes[..., k % 32] += x[:, k, None] * w[:, k]
    for offset in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[..., np.arange(32) ^ offset]
    return lanes[..., 0]


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("n_in", [172, 512, 1200])
@pytest.mark.parametrize("n_rows", [1, 9])
def test_sums_are_in_the_documented_order(kind: str, n_in: int, n_rows: int, there: OpsThere) -> None:
    rng = np.random.default_rng(n_in)
    values = random_matrix("BF16", (5 * n_in + n_rows * n_in,), 6).data  # products of 8 bits by 8 bits are exact
    assert isinstance(values, np.ndarray)
    floats = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    w, x = floats[: 5 * n_in].reshape(5, n_in), floats[5 * n_in :].reshape(n_rows, n_in)
    matrix = random_matrix(kind, (5, n_in), 4)
    data = w if kind == "F32" else (w.view(np.uint32) >> 16).astype(np.uint16)
    packed = there.matrix(type(matrix)(kind, matrix.type, (5, n_in), data.reshape(-1).view(np.uint8)))
    bias, residual = rng.standard_normal(5).astype(np.float32), rng.standard_normal((n_rows, 5)).astype(np.float32)
    y = there.xp.zeros((n_rows, 5), there.xp.float32)
    given = {"bias": there.put(bias), "residual": there.put(residual)}
    matmul.linear(there.ops.kernels, Rows(n_rows, there.put(x)), packed, y, **given)
    np.testing.assert_array_equal(to_numpy(y), in_order(x, w) + bias + residual)
