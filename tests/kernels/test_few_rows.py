"""Several matrices and what follows a product in one kernel: the bits of one product or kernel after another."""

import numpy as np
import pytest

from refengine.cuda.kernels.few_rows import Activation
from tests.kernels.matrices import TILED, random_matrix
from tests.kernels.products import few_rows, prepared, prepared_for, product
from tests.kernels.runner import Kernels


def columns_for(*kinds: str) -> int:
    """A number of columns that all types allow; the last segment is not whole if they allow that."""
    return 768 if any(kind.endswith("_K") for kind in kinds) else 544


@pytest.mark.parametrize("kinds", [*((kind,) * 3 for kind in TILED), ("Q4_K", "Q4_K"), ("Q4_K", "Q4_K", "Q6_K"),
                                   ("Q5_0", "Q5_0", "Q8_0"), ("Q8_0", "MXFP4", "Q4_1")])  # fmt: skip
def test_q_k_and_v_in_one_kernel_are_the_same(kinds: tuple[str, ...], activations: Kernels, few: Kernels) -> None:
    """Of one type or of several."""
    rng = np.random.default_rng(20)
    n_rows, n_in = 3, columns_for(*kinds)
    shapes = zip(kinds, (48, 32, 19), range(21, 24), strict=False)
    matrices = [random_matrix(kind, (n_out, n_in), seed) for kind, n_out, seed in shapes]
    biases = [rng.standard_normal(w.shape[0]).astype(np.float32) if w.shape[0] != 32 else None for w in matrices]
    given = prepared_for(matrices[0], activations, rng.standard_normal((n_rows, n_in)).astype(np.float32))
    expected = [product(few, w, given, bias) for w, bias in zip(matrices, biases, strict=True)]
    y = few_rows(few, matrices, given, biases, warps=2, blocks=3)
    np.testing.assert_array_equal(y, np.concatenate(expected, axis=1))


@pytest.mark.parametrize("kinds", [*((kind, kind) for kind in TILED), ("Q4_K", "Q6_K"), ("Q8_0", "Q5_1")])
def test_an_activation_in_the_kernel_is_the_same(
    kinds: tuple[str, str], place: str, activations: Kernels, few: Kernels
) -> None:
    """SwiGLU, clamped SwiGLU and GELU behind the products."""
    elements = Kernels("activation", place)
    rng = np.random.default_rng(10)
    n_rows, n_out, n_in = 5, 40, columns_for(*kinds)
    matrices = [random_matrix(kind, (n_out, n_in), 11 + i) for i, kind in enumerate(kinds)]
    biases = list(rng.standard_normal((2, n_out)).astype(np.float32))
    given = prepared_for(matrices[0], activations, rng.standard_normal((n_rows, n_in)).astype(np.float32))
    parts = [product(few, w, given, bias) for w, bias in zip(matrices, biases, strict=True)]
    for activation, name in ((Activation.SWIGLU, "swiglu_f32"), (Activation.SWIGLU_CLAMPED, "swiglu_clamped_f32")):
        expected = np.empty_like(parts[0])
        elements.launch(name, (1,), (256,), [*parts, expected, np.int64(expected.size)])
        y = few_rows(few, matrices, given, biases, activation=activation, warps=5, blocks=2)
        np.testing.assert_array_equal(y, expected)
    expected = np.empty_like(parts[1])
    elements.launch("gelu_f32", (1,), (256,), [parts[1], expected, np.int64(expected.size)])
    y = few_rows(few, matrices[1:], given, biases[1:], activation=Activation.GELU, warps=3, blocks=3)
    np.testing.assert_array_equal(y, expected)


def test_squares_are_those_of_the_rows(place: str, activations: Kernels, few: Kernels) -> None:
    """The sum of squares of every 16 outputs, as the kernel for any rows gives it."""
    rng = np.random.default_rng(30)
    n_rows, n_out, n_in = 3, 96, 256
    w, residual = random_matrix("Q4_K", (n_out, n_in), 31), rng.standard_normal((n_rows, n_out)).astype(np.float32)
    x = rng.standard_normal((n_rows, n_in)).astype(np.float32)
    x[1, 7] = np.nan
    found, expected = np.zeros((2, n_rows, n_out // 16), np.float32)
    y = few_rows(few, [w], prepared(activations, x), [None], residual=residual, squares=found, warps=3, blocks=2)
    Kernels("norm", place).launch("row_squares", (n_rows, 1), (256,), [y, expected, n_out])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, (y.reshape(n_rows, -1, 16) ** 2).sum(axis=-1), rtol=16 * 2.0**-24)
