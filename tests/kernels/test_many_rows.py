"""Products of many rows: bit for bit those of few rows, for all types, numbers of rows, launches, and experts."""

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.cuda.kernels.matmul import ManyRowsLaunch, many_rows_launch
from refengine.cuda.kernels.moe import NO_GROUPS
from refengine.cuda.layout import pack
from refengine.cuda.runtime.source import Struct
from tests.kernels.matrices import TILED, random_matrix
from tests.kernels.products import activations_of, prepared, product
from tests.kernels.runner import Kernels

QUANTISED = [kind for kind in TILED if kind != "F16"]


def many_rows(
    module: Kernels,
    w: Any,
    given: list[np.ndarray],
    how: tuple[int, int, int, int],
    *,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    groups: list[np.ndarray] | None = None,
) -> np.ndarray:
    """`matmul.linear` with another launch than it chooses. how: row warps, tiles, depth, stages. groups: the
    arrays of the struct `Groups`."""
    n_out, n_in = w.shape[-2:]
    n_rows = len(given[0])
    y = np.full((len(groups[1]) if groups else n_rows, n_out), np.nan, np.float32)
    row_warps, tiles, depth, stages = how
    launch = ManyRowsLaunch(w.type, row_warps, tiles, depth, stages, min(32 * row_warps, -(-len(y) // 16) * 16))
    grid = launch.grid(-(-n_out // 16), n_rows, len(groups[0]) if groups else None)
    struct = Struct(*groups) if groups else NO_GROUPS
    arguments = [pack(np, w).data, activations_of(given), struct, bias, residual, y, n_out, n_in, n_rows]
    module.launch(launch.kernel, grid, (launch.threads,), [*arguments, *launch.arguments], launch.shared_bytes)
    return y


@pytest.mark.parametrize("kind", QUANTISED)
def test_many_rows_have_the_bits_of_few_rows(kind: str, activations: Kernels, matmul: Kernels, few: Kernels) -> None:
    rng = np.random.default_rng(40)
    n_out, n_in = 37, 768 if kind.endswith("_K") else 608  # the last segment is not whole where the type allows it
    w = random_matrix(kind, (n_out, n_in), 41)
    x = (rng.standard_normal((65, n_in)) * np.exp(rng.standard_normal((65, 1)) * 9)).astype(np.float32)
    x[7, 3], x[40, 300] = np.nan, np.inf
    given = prepared(activations, x)
    bias, residual = rng.standard_normal(n_out).astype(np.float32), rng.standard_normal((65, n_out)).astype(np.float32)
    expected = product(few, w, given, bias, residual=residual)
    assert np.isfinite(np.delete(expected, (7, 40), axis=0)).all()
    launches = {  # row warps, tiles, depth, stages
        9: (1, 2, 4, 2),
        17: (2, 1, 2, 3),
        33: (1, 3, 1, 4),
        50: (1, 1, 4, 2),
        64: (2, 2, 1, 3),
        65: (2, 2, 2, 2),
    }
    for n_rows, how in launches.items():
        first = [part[:n_rows] for part in given]
        y = many_rows(matmul, w, first, how, bias=bias, residual=residual[:n_rows])
        np.testing.assert_array_equal(y, expected[:n_rows])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_1", "MXFP4"])
def test_the_largest_codes_and_activations_are_exact(
    kind: str, activations: Kernels, matmul: Kernels, few: Kernels
) -> None:
    """Rows of one sign, and of the largest integers, with weights whose bits are all ones or all zeros."""
    w = random_matrix(kind, (48, 512), 42)
    assert isinstance(w.data, np.ndarray)
    blocks = w.data.reshape(48, -1)
    keep = blocks.copy()
    blocks[::3], blocks[1::3] = 0x7B, 0x00  # a half of 0x7b7b is finite, and so is an exponent
    blocks[2::3] = np.where(np.arange(blocks.shape[1]) % 5, 0x3F, keep[2::3] & 0x3F)
    x = np.full((70, 512), 32639.0, np.float32)
    x[1::2] *= -1.0
    x[2::4, ::2] = -32639.0
    x[3::8] = np.where(np.arange(512) % 3, 0.5, 127.0)
    given = prepared(activations, x)
    np.testing.assert_array_equal(many_rows(matmul, w, given, (2, 3, 1, 2)), product(few, w, given, None))


@pytest.mark.parametrize("kind", ["MXFP4", "Q4_K", "Q6_K"])
def test_experts_have_the_bits_of_their_matrices(
    kind: str, activations: Kernels, matmul: Kernels, few: Kernels
) -> None:
    """Groups of up to 64 rows in any order; an empty group, and rows that several groups read."""
    rng = np.random.default_rng(43)
    n_expert, n_out, n_in, n_rows = 3, 40, 512, 70
    w = random_matrix(kind, (n_expert, n_out, n_in), 44)
    bias = rng.standard_normal((n_expert, n_out)).astype(np.float32)
    given = prepared(activations, rng.standard_normal((n_rows, n_in)).astype(np.float32))
    group = np.array([[2, 0, 64], [2, 64, 5], [0, 69, 33], [1, 102, 0], [1, 102, 10]], np.int32)
    x_rows, y_rows = rng.integers(0, n_rows, 112).astype(np.int32), rng.permutation(112).astype(np.int32)
    expected = np.empty((112, n_out), np.float32)
    assert isinstance(w.data, np.ndarray)
    for expert, first, count in group.tolist():
        one = type(w)("one", w.type, (n_out, n_in), w.data.reshape(n_expert, -1)[expert])
        rows = [part[x_rows[first : first + count]] for part in given]
        if count:
            expected[y_rows[first : first + count]] = product(few, one, rows, bias[expert])
    for how in ((1, 2, 1, 2), (2, 1, 2, 2), (2, 3, 1, 3)):
        y = many_rows(matmul, w, given, how, bias=bias, groups=[group, x_rows, y_rows])
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("kind", QUANTISED)
def test_launches_fit_every_device(kind: str, shared: int) -> None:
    of_type = GGMLQuantizationType[kind]
    for n_tiles, n_in, n_rows, n_groups in (
        (56, 896, 512, None),
        (1, 256, 9, None),
        (1024, 3072, 2048, None),
        (180, 2880, 2048, 64),
    ):
        launch = many_rows_launch(of_type, n_tiles, n_in, n_rows, n_groups, 132, shared)
        assert launch.shared_bytes <= shared
        assert launch.threads <= 512
