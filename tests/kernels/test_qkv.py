"""Products with Q, K and V in one kernel: the bits of one product after another."""

import numpy as np
import pytest

from refengine.cuda.kernels.qkv import NO_MATRIX
from refengine.cuda.layout import pack
from tests.kernels.matrices import TILED, random_matrix
from tests.kernels.products import activations_of, few_rows, prepared, product
from tests.kernels.runner import Kernels


@pytest.fixture(scope="module")
def activations(place: str) -> Kernels:
    return Kernels("quantize_rows", place)


@pytest.fixture(scope="module")
def matmul(place: str) -> Kernels:
    return Kernels("matmul", place)


@pytest.mark.parametrize("n_matrices", [2, 3])
@pytest.mark.parametrize("kind", TILED)
def test_q_k_and_v_in_one_kernel_are_the_same(
    kind: str, n_matrices: int, place: str, activations: Kernels, matmul: Kernels
) -> None:
    rng = np.random.default_rng(20)
    n_rows, n_in = 3, 768 if kind.endswith("_K") else 544
    n_outs = (48, 32, 19)[:n_matrices]
    matrices = [random_matrix(kind, (n_out, n_in), 21 + i) for i, n_out in enumerate(n_outs)]
    biases = [rng.standard_normal(n_out).astype(np.float32) if n_out != 32 else None for n_out in n_outs]
    given = prepared(activations, rng.standard_normal((n_rows, n_in)).astype(np.float32))
    expected = [product(matmul, "rows8", w, given, bias) for w, bias in zip(matrices, biases, strict=True)]
    y = np.full((n_rows, sum(n_outs)), np.nan, np.float32)
    structs = [pack(np, w).struct for w in matrices] + [NO_MATRIX] * (3 - n_matrices)
    last, shared = few_rows(matrices[0], n_rows, 2)
    sizes = [48, 32, sum(n_outs), n_in, n_rows, *last, 0.0]
    arguments = [*structs, activations_of(given), *biases, *[None] * (3 - n_matrices), y, *sizes]
    Kernels("qkv", place).launch(f"qkv_{kind.lower()}", (3,), (64,), arguments, shared)
    np.testing.assert_array_equal(y, np.concatenate(expected, axis=1))
