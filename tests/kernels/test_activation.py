"""Element-wise operations, against their NumPy twins."""

from collections.abc import Callable

import numpy as np
import pytest

from refengine.ops import activation
from tests.kernels.runner import Kernels

EPS = 2.0**-24  # float32, half a unit in the last place
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 7.0, -7.0, 6.9999995, 7.000001, 88.0, -88.0, 1e4, -1e4, 1e30, np.inf, np.nan]


@pytest.fixture(scope="module")
def activations(place: str) -> Kernels:
    return Kernels("activation", place)


def test_activations_are_within_float32_of_their_twins(activations: Kernels) -> None:
    rng = np.random.default_rng(5)
    gate, up = (np.append(rng.standard_normal(1000) * 4, SPECIAL).astype(np.float32) for _ in range(2))
    n, grid = np.int64(len(gate)), (-(-len(gate) // 256),)
    with np.errstate(all="ignore"):
        cases: dict[str, tuple[list[np.ndarray], Callable[..., np.ndarray]]] = {
            "swiglu_f32": ([gate, up], activation.swiglu),
            "swiglu_clamped_f32": ([gate, up], activation.swiglu_clamped),
            "gelu_f32": ([gate], activation.gelu),
        }
        for kernel, (given, twin) in cases.items():
            y = np.empty_like(gate)
            activations.launch(kernel, grid, (256,), [*given, y, n])
            expected = twin(np, *(a.astype(np.float64) for a in given))
            # expf and tanhf: 2 units in the last place on CUDA; the rounded argument of e^x weighs |x| times as much,
            # and 1 + tanh cancels for negative arguments, down to half a unit of 1.
            tolerance = (8 + np.abs(np.clip(gate, -90, 90))) * EPS * np.abs(expected) + 2e-38
            if kernel == "gelu_f32":
                tolerance += 4 * EPS * np.abs(np.clip(gate, -10, 0))
            same = (y == expected.astype(np.float32)) | (np.isnan(y) & np.isnan(expected))
            close = same | (np.abs(y - expected) <= tolerance)
            assert close.all(), (kernel, given[0][~close], y[~close], expected[~close])


def test_a_scale_is_one_rounding(activations: Kernels) -> None:
    x = np.append(np.random.default_rng(6).standard_normal(1000) * 4, SPECIAL).astype(np.float32)
    y = np.empty_like(x)
    activations.launch("scale_f32", (-(-len(x) // 256),), (256,), [x, y, 0.3, np.int64(len(x))])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y, x * np.float32(0.3))
