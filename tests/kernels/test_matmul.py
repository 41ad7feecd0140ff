"""Products with quantised weights: against float64, and bit for bit the same however rows are grouped."""

from typing import Any

import numpy as np
import pytest

from refengine import quants
from refengine.cuda.kernels.norm import norm_bytes
from refengine.cuda.layout import pack
from refengine.cuda.runtime.host import HostModule
from refengine.cuda.runtime.source import folder, source_of
from refengine.ops.halves import rounded_rows
from refengine.ops.integers import by_segment, rounded_to_integers
from tests.kernels.matrices import TILED, random_matrix
from tests.kernels.products import activations_of, few_rows, prepared, prepared_for, product
from tests.kernels.runner import Kernels

EPS = 2.0**-24  # float32, half a unit in the last place
# Half of the last bit: of integers, for the largest of a segment, which is at least 2^14; of halves, for any element.
ROUNDING = 2.0**-15
HALF = 2.0**-11


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_come_through_and_stay_in_their_row(bad: float, activations: Kernels, few: Kernels) -> None:
    x = np.random.default_rng(5).standard_normal((3, 256)).astype(np.float32)
    x[1, 77] = bad
    y = product(few, random_matrix("Q4_K", (32, 256), 1), prepared(activations, x), None)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("file", ["few_rows", "matmul"])
@pytest.mark.parametrize("kind", TILED)
def test_products_are_within_float32_of_the_rounded_activations(
    kind: str, file: str, activations: Kernels, place: str
) -> None:
    kernels = Kernels(file, place)
    rng = np.random.default_rng(6)
    n_rows, n_out, n_in = 5, 37, 768
    w = random_matrix(kind, (n_out, n_in), 7)
    x = rng.standard_normal((n_rows, n_in)).astype(np.float32) * np.array([1, 1e6, 1e-6, 30, 1e-3], np.float32)[:, None]
    bias = rng.standard_normal(n_out).astype(np.float32)
    given = prepared_for(w, activations, x)
    y = product(kernels, w, given, bias)
    assert isinstance(w.data, np.ndarray)
    values = quants.dequantize(np, w.data, w.type, w.shape).astype(np.float64)
    segments = by_segment(np, x)
    rounded = (rounded_rows(np, segments).reshape(x.shape) if kind == "F16" else rounded_to_integers(np, x)).astype(
        np.float64
    )
    exact = rounded @ values.T + bias
    # Of all that is added up (for types with a minimum, its part and the codes' part are larger than their difference):
    # integers are exact, so 8 multiply-adds or 5 roundings of a whole segment, 3 segments, the bias; F16: a tensor
    # core's 16 sums.
    magnitude = np.abs(rounded) @ code_magnitudes(w, values).T + np.abs(bias)
    assert (np.abs(y - exact) <= (90 if kind == "F16" else 16) * EPS * magnitude).all()
    # Against the unrounded activations their rounding is on top.
    oracle = x.astype(np.float64) @ values.T + bias
    largest = np.repeat(np.abs(segments).max(axis=-1), 256, axis=1)
    error = HALF * np.abs(x) if kind == "F16" else ROUNDING * largest
    assert (np.abs(y - oracle) <= error @ np.abs(values).T + 90 * EPS * magnitude).all()
    # What it comes to, in rows of 1e6 as in rows of 1e-6: errors of random signs do not add up.
    plain = product(kernels, w, given, None)
    relative = np.sqrt(np.mean((plain - (oracle - bias)) ** 2, axis=1) / np.mean((oracle - bias) ** 2, axis=1))
    assert (relative < (HALF if kind == "F16" else 2.0**-13)).all()


def code_magnitudes(w: Any, values: np.ndarray) -> np.ndarray:
    """At least |scale · code| + |minimum| of every value: the two are large where any value of their block is.

    Codes are random, so that a block of the file has some that are near 0 and some near the largest.
    """
    blocks = np.abs(values).reshape(len(values), -1, min(256, values.shape[1]))
    return np.repeat(2 * blocks.max(axis=-1), blocks.shape[-1], axis=1)


@pytest.mark.parametrize("kind", TILED)
def test_every_grouping_of_rows_gives_the_same_bits(
    kind: str, activations: Kernels, few: Kernels, matmul: Kernels
) -> None:
    rng = np.random.default_rng(8)
    w = random_matrix(kind, (48, 512), 9)
    x = rng.standard_normal((70, 512)).astype(np.float32)
    whole = product(matmul, w, prepared_for(w, activations, x), None)
    np.testing.assert_array_equal(product(few, w, prepared_for(w, activations, x), None, warps=1), whole)
    residual = rng.standard_normal((70, 48)).astype(np.float32)
    for kernels in (few, matmul):
        added = product(kernels, w, prepared_for(w, activations, x), None, residual=residual)
        np.testing.assert_array_equal(added, whole + residual)
    for rows in ([3], [69], [5, 1], list(range(17, 40)), rng.permutation(70).tolist()[:9]):
        for kernels, warps in ((few, 2), (few, 5), (matmul, 3)):
            alone = product(kernels, w, prepared_for(w, activations, np.ascontiguousarray(x[rows])), None, warps)
            np.testing.assert_array_equal(alone, whole[rows])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "Q6_K", "MXFP4", "F16"])
def test_rows_that_the_product_prepares_are_the_same(
    kind: str, norm: bool, activations: Kernels, few: Kernels, place: str
) -> None:
    """Norm and conversion to halves in front of a product with few rows: the bits of their own kernels."""
    rng = np.random.default_rng(12)
    n_out, n_in, eps = 21, 1280 if kind.endswith("_K") else 1120, 1e-5
    w = random_matrix(kind, (n_out, n_in), 13)
    weight = rng.standard_normal(n_in).astype(np.float32)
    norms = Kernels("norm", place)
    for n_rows, warps in ((1, 1), (1, 5), (1, 8), (2, 3), (3, 7), (5, 4), (11, 2)):
        x = (rng.standard_normal((n_rows, n_in)) * np.exp(rng.standard_normal((n_rows, 1)) * 9)).astype(np.float32)
        if n_rows > 2:
            x[1, 5], x[2, 7] = np.nan, np.inf
            x[0] = 0.0
        rows = prepared_for(w, activations, x)
        if norm:
            halves = np.int32(kind == "F16")
            arguments = [x, weight, None, rows[0], rows[2], rows[1], n_in, halves, np.float32(eps)]
            norms.launch("rms_norm_rows", (n_rows,), (256,), arguments, 4 * n_in + norm_bytes(n_in))
        expected = product(few, w, rows, None)
        squares = np.empty((n_rows, n_in // 16), np.float32)
        norms.launch("row_squares", (n_rows, -(-n_in // 256)), (256,), [x, squares, n_in])
        given = [None, None, None, x, squares, weight] if norm else [None, None, None, x, None, None]
        y = few_rows(few, [w], given, [None], warps=min(warps, 6) if kind == "F16" else warps, eps=eps)
        np.testing.assert_array_equal(y, expected)


PLAIN = """
extern "C" __global__ void plain(const unsigned char* w, Activations x, float* y, int n_out, int n_in) {
  for (int out = threadIdx.x; out < n_out; out += blockDim.x)
    y[blockIdx.x * n_out + out] = plain_sum<TYPE>(Tiles{w, n_in / 32}, x, blockIdx.x, out);
}
"""


@pytest.mark.parametrize("kind", [kind for kind in TILED if kind != "F16"])
def test_the_plain_loop_is_the_kernels_bit_for_bit(kind: str) -> None:
    """The last segment of a row is not whole where the type allows it."""
    headers = ("common.cuh", "arguments.cuh", "quants.cuh", "matmul.cuh", "quantize_rows.cuh", "matmul_plain.cuh")
    parts = [(name, (folder() / name).read_text(encoding="utf-8")) for name in headers]
    plain = HostModule(source_of("plain", *parts, ("plain.cu", PLAIN.replace("TYPE", kind))))
    n_rows, n_out, n_in = 3, 21, 512 if kind.endswith("_K") else 416
    w = random_matrix(kind, (n_out, n_in), 30)
    x = np.random.default_rng(31).standard_normal((n_rows, n_in)).astype(np.float32)
    given = prepared(Kernels("quantize_rows", "host"), x)
    expected = product(Kernels("few_rows", "host"), w, given, None)
    y = np.full((n_rows, n_out), np.nan, np.float32)
    plain.launch("plain", (n_rows,), (8,), [pack(np, w).data, activations_of(given), y, n_out, n_in])
    np.testing.assert_array_equal(y, expected)
