"""The device's order of weights, through the kernel that reads it back: every value is ggml's, to the bit."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.cuda.layout import activation_order, pack
from refengine.errors import ModelError
from refengine.weights import Matrix
from tests.kernels.matrices import TILED, random_matrix
from tests.kernels.runner import Kernels


@pytest.fixture(scope="module")
def module(place: str) -> Kernels:
    return Kernels("embedding", place)


@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("shape", [(16, 256), (37, 512), (5, 768), (20, 544)])
def test_every_value_is_bit_exact(kind: str, shape: tuple[int, int], module: Kernels) -> None:
    """And the sums of squares are those of the kernel for any rows."""
    n_out, n_in = shape
    if n_in % 256 and kind.endswith("_K"):
        pytest.skip(f"rows of {kind} are multiples of 256")
    w = random_matrix(kind, shape, seed=shape[0])
    packed = pack(np, w)
    ids = np.random.default_rng(1).permutation(n_out).astype(np.int32)
    out = np.full((n_out, n_in), np.nan, np.float32)
    grid = (n_out, -(-(n_in // 32) // 8))
    squares, expected_squares = np.full((2, n_out, n_in // 16), np.nan, np.float32)
    module.launch(f"embedding_{kind.lower()}", grid, (32,), [packed.data, ids, out, squares, n_in])
    assert isinstance(w.data, np.ndarray)
    expected = quants.dequantize(np, w.data, w.type, shape)[ids]
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))
    module.of("norm").launch("row_squares", (n_out, -(-n_in // 256)), (256,), [out, expected_squares, n_in])
    np.testing.assert_array_equal(squares, expected_squares)
    out[:] = np.nan
    module.launch(f"embedding_{kind.lower()}", grid, (32,), [packed.data, ids, out, None, n_in])
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", TILED)
def test_packing_adds_only_whole_tiles(kind: str) -> None:
    w = random_matrix(kind, (40, 512), seed=2)
    blocks = 48 * 512 // 256
    wider = 4 * blocks if kind in ("Q4_K", "Q5_K") else 0  # scales of six bits have a byte each: 16 bytes instead of 12
    assert pack(np, w).n_bytes == w.data.nbytes * 48 // 40 + wider


def test_rows_that_are_no_whole_tiles_are_refused() -> None:
    with pytest.raises(ModelError, match="rows of 48 are not a multiple of 32"):
        pack(np, Matrix("x", GGMLQuantizationType.F16, (2, 48), np.zeros(192, np.uint8)))


def test_activations_follow_the_lanes() -> None:
    order = activation_order()
    assert order[:16].tolist() == [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23]
    assert sorted(order.tolist()) == list(range(32))
