"""The first half of a feed-forward in one kernel: the bits of products and activations one after another."""

import numpy as np
import pytest

from refengine.cuda.kernels.moe import NO_GROUPS
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


@pytest.mark.parametrize("kind", TILED)
def test_gate_and_up_in_one_kernel_are_the_same(kind: str, place: str, activations: Kernels, matmul: Kernels) -> None:
    """SwiGLU, clamped SwiGLU and GELU behind the products: as products and activations one after another."""
    gate_up, elements = Kernels("gate_up", place), Kernels("activation", place)
    rng = np.random.default_rng(10)
    n_rows, n_out, n_in = 5, 40, 544
    if kind.endswith("_K"):
        n_in = 768
    gate, up = random_matrix(kind, (n_out, n_in), 11), random_matrix(kind, (n_out, n_in), 12)
    biases = rng.standard_normal((2, n_out)).astype(np.float32)
    given = prepared(activations, rng.standard_normal((n_rows, n_in)).astype(np.float32))
    parts = [product(matmul, "rows8", w, given, bias) for w, bias in zip((gate, up), biases, strict=True)]
    sizes = [n_out, n_in, n_rows]
    for clamped, name in enumerate(("swiglu_f32", "swiglu_clamped_f32")):
        expected, y = np.empty_like(parts[0]), np.full_like(parts[0], np.nan)
        elements.launch(name, (1,), (256,), [*parts, expected, np.int64(y.size)])
        matrices = [pack(np, gate).struct, pack(np, up).struct]
        last, shared = few_rows(gate, n_rows, 5, n_matrices=2)
        arguments = [*matrices, activations_of(given), NO_GROUPS, *biases, y, *sizes, clamped, *last, 0.0]
        gate_up.launch(f"gate_up_{kind.lower()}", (2,), (160,), arguments, shared)
        np.testing.assert_array_equal(y, expected)
    expected, y = np.empty_like(parts[1]), np.full_like(parts[1], np.nan)
    elements.launch("gelu_f32", (1,), (256,), [parts[1], expected, np.int64(y.size)])
    last, shared = few_rows(up, n_rows, 3)
    arguments = [pack(np, up).struct, activations_of(given), biases[1], y, *sizes, *last, 0.0]
    gate_up.launch(f"up_gelu_{kind.lower()}", (3,), (96,), arguments, shared)
    np.testing.assert_array_equal(y, expected)
