"""The rotary position embedding, against its NumPy twins."""

import numpy as np
import pytest

from refengine.ops import rope
from tests.kernels.runner import Kernels


@pytest.fixture(scope="module")
def ropes(place: str) -> Kernels:
    return Kernels("rope", place)


@pytest.mark.parametrize("kind", ["neox", "norm"])
@pytest.mark.parametrize(("head_dim", "n_rot"), [(64, 64), (48, 32), (6, 4)])
def test_rope_is_its_twin_bit_for_bit(kind: str, head_dim: int, n_rot: int, ropes: Kernels) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 3, head_dim)).astype(np.float32)
    angle = rng.uniform(0, 6, (5, 1, n_rot // 2)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    y = np.full_like(x, np.nan)
    sizes = [np.int32(n_rot // 2), np.int32(head_dim)]
    ropes.launch(f"rope_{kind}_f32", (5, 3), (32,), [x, cos, sin, y, *sizes])
    twin = {"neox": rope.rope_neox, "norm": rope.rope_norm}[kind]
    np.testing.assert_array_equal(y, twin(np, x, cos, sin))
