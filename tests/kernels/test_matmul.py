"""Products with quantised weights: against float64, and bit for bit the same however rows are grouped."""

from typing import Any

import numpy as np
import pytest

from refengine import quants
from refengine.cuda.kernels.matmul import NO_GROUPS
from refengine.cuda.kernels.qkv import NO_MATRIX
from refengine.cuda.layout import activation_order, pack
from refengine.cuda.reference import block_sums, quantize_rows
from refengine.cuda.runtime.host import HostModule
from refengine.cuda.runtime.source import Struct, folder, source_of
from tests.kernels.matrices import TILED, random_matrix
from tests.kernels.runner import Kernels

EPS = 2.0**-24  # float32, half a unit in the last place
HALF = 2.0**-11  # float16, the same


@pytest.fixture(scope="module")
def activations(place: str) -> Kernels:
    return Kernels("quantize_rows", place)


@pytest.fixture(scope="module")
def matmul(place: str) -> Kernels:
    return Kernels("matmul", place)


def prepared(module: Kernels, x: np.ndarray, warps: int = 4, order: int = 0) -> list[np.ndarray]:
    """Halves, block sums and scales of rows: what the product's kernels take."""
    n_rows, n_in = x.shape
    halves, scale = np.zeros((n_rows, n_in), np.float16), np.zeros(n_rows, np.float32)
    sums = np.zeros((n_rows, n_in // 32), np.uint32)
    module.launch("quantize_rows_f16", (n_rows,), (32 * warps,), [x, halves, scale, sums, np.int32(n_in)], order=order)
    return [halves, sums, scale]


def product(
    module: Kernels,
    kernel: str,
    w: Any,
    given: list[np.ndarray],
    bias: np.ndarray | None,
    warps: int = 4,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    n_out, n_in = w.shape
    n_rows = len(given[0])
    y = np.full((n_rows, n_out), np.nan, np.float32)
    tiles, segments = -(-n_out // 16), -(-n_in // 256)
    few = kernel.startswith("rows8")
    blocks = max(1, tiles - warps + 1)  # some have several tiles
    grid = (blocks, -(-n_rows // 8)) if few else (-(-tiles // warps), -(-n_rows // 64))
    sizes = [np.int32(n_out), np.int32(n_in), np.int32(n_rows)]
    arguments = [pack(np, w).struct, Struct(*given), NO_GROUPS, bias, residual, y, *sizes]
    module.launch(f"{kernel}_{w.type.name.lower()}", grid, (32 * warps,), arguments, 1024 * segments if few else 0)
    return y


@pytest.mark.parametrize("warps", [1, 3])
def test_activation_rows_are_their_twins_bit_for_bit(warps: int, activations: Kernels) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((9, 96)).astype(np.float32)
    magnitudes = [1, 1e6, 1e-6, 1e30, 1e-30, 1e-42, 0, 3.4e38, 65504]
    x *= np.array(magnitudes, np.float32)[:, None]
    x[7] = np.clip(x[7], -3.4e38, 3.4e38)
    halves, sums, scale = prepared(activations, x, warps)
    expected, expected_scale = quantize_rows(x)
    np.testing.assert_array_equal(halves.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(scale, expected_scale)
    # 31 additions of float32, in a tree of five: each level rounds once. Two halves hold it to 2^-22 of itself, and to
    # half of their smallest number, 2^-25.
    bound = (5 * EPS + 2.0**-22) * np.abs(expected.astype(np.float64)).reshape(9, -1, 32).sum(axis=-1) + 32 * 2.0**-25
    parts = sums.view(np.float16).astype(np.float64).reshape(9, -1, 2)
    assert (np.abs(32 * parts.sum(axis=-1) - block_sums(expected)) <= bound).all()
    back = np.empty_like(x)
    back[:, activation_order(96)] = halves.astype(np.float64) * scale[:, None]
    usable = np.abs(x) > 2.0**-28 * np.abs(x).max(axis=1, keepdims=True)
    normal = usable & (np.abs(x) > 1e-37)
    assert (np.abs(back - x)[normal] <= HALF * np.abs(x)[normal]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_come_through_and_stay_in_their_row(bad: float, activations: Kernels, matmul: Kernels) -> None:
    x = np.random.default_rng(5).standard_normal((3, 256)).astype(np.float32)
    x[1, 77] = bad
    y = product(matmul, "rows8", random_matrix("Q4_K", (32, 256), 1), prepared(activations, x), None)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("kernel", ["rows8", "rows64"])
@pytest.mark.parametrize("kind", TILED)
def test_products_are_within_float32_of_the_rounded_activations(
    kind: str, kernel: str, activations: Kernels, matmul: Kernels
) -> None:
    rng = np.random.default_rng(6)
    n_rows, n_out, n_in = 5, 37, 768
    w = random_matrix(kind, (n_out, n_in), 7)
    x = rng.standard_normal((n_rows, n_in)).astype(np.float32) * np.array([1, 1e6, 1e-6, 30, 1e-3], np.float32)[:, None]
    bias = rng.standard_normal(n_out).astype(np.float32)
    given = prepared(activations, x)
    y = product(matmul, kernel, w, given, bias)
    values = quants.dequantize(np, w.data, w.type, w.shape).astype(np.float64)
    rounded = np.empty((n_rows, n_in))
    rounded[:, activation_order(n_in)] = given[0].astype(np.float64) * given[2][:, None]
    exact = rounded @ values.T + bias
    # Of all that is added up (for types with a minimum, its part and the codes' part are larger than their difference):
    # 24 fused multiply-adds, 3 segments, the tensor core's 32 sums, the scale, the bias; block sums to 4 EPS.
    magnitude = np.abs(rounded) @ code_magnitudes(w, values).T + np.abs(bias)
    assert (np.abs(y - exact) <= 90 * EPS * magnitude).all()
    # Against the unrounded activations the halves' rounding is on top, 2^-11 of every term at most.
    oracle = x.astype(np.float64) @ values.T + bias
    assert (np.abs(y - oracle) <= HALF * (np.abs(x) @ np.abs(values).T) + 90 * EPS * magnitude).all()
    # What it comes to, in rows of 1e6 as in rows of 1e-6: errors of random signs do not add up.
    plain = product(matmul, kernel, w, given, None)
    relative = np.sqrt(np.mean((plain - (oracle - bias)) ** 2, axis=1) / np.mean((oracle - bias) ** 2, axis=1))
    assert (relative < HALF).all()


def code_magnitudes(w: Any, values: np.ndarray) -> np.ndarray:
    """At least |scale · code| + |minimum| of every value: the two are large where any value of their block is.

    Codes are random, so that a block of the file has some that are near 0 and some near the largest.
    """
    blocks = np.abs(values).reshape(len(values), -1, min(256, values.shape[1]))
    return np.repeat(2 * blocks.max(axis=-1), blocks.shape[-1], axis=1)


@pytest.mark.parametrize("kind", TILED)
def test_every_grouping_of_rows_gives_the_same_bits(kind: str, activations: Kernels, matmul: Kernels) -> None:
    rng = np.random.default_rng(8)
    w = random_matrix(kind, (48, 512), 9)
    x = rng.standard_normal((70, 512)).astype(np.float32)
    whole = product(matmul, "rows64", w, prepared(activations, x), None)
    few = product(matmul, "rows8", w, prepared(activations, x), None, warps=1)
    np.testing.assert_array_equal(whole, few)
    residual = rng.standard_normal((70, 48)).astype(np.float32)
    for kernel in ("rows8", "rows64"):
        added = product(matmul, kernel, w, prepared(activations, x), None, residual=residual)
        np.testing.assert_array_equal(added, whole + residual)
    for rows in ([3], [69], [5, 1], list(range(17, 40)), rng.permutation(70).tolist()[:9]):
        for kernel, warps in (("rows8", 2), ("rows8", 5), ("rows64", 3)):
            alone = product(matmul, kernel, w, prepared(activations, np.ascontiguousarray(x[rows])), None, warps)
            np.testing.assert_array_equal(alone, whole[rows])


PLAIN = """
extern "C" __global__ void plain(Matrix w, Activations x, float* y, int n_out, int n_in) {
  int row = blockIdx.x;
  for (int out = threadIdx.x; out < n_out; out += blockDim.x)
    y[row * n_out + out] = plain_sum<TYPE>(planes_of(w, n_in), x, row, out) * x.scale[row];
}
"""


@pytest.mark.parametrize("kind", TILED)
def test_the_plain_loop_is_the_kernels_bit_for_bit(kind: str) -> None:
    """On the CPU, whose tensor core rounds once; the last segment of a row is not whole where the type allows it."""
    headers = ("common.cuh", "arguments.cuh", "quants.cuh", "matmul.cuh", "matmul_plain.cuh")
    parts = [(name, (folder() / name).read_text(encoding="utf-8")) for name in headers]
    plain = HostModule(source_of("plain", *parts, ("plain.cu", PLAIN.replace("TYPE", kind))))
    n_rows, n_out, n_in = 3, 21, 512 if kind.endswith("_K") else 416
    w = random_matrix(kind, (n_out, n_in), 30)
    x = np.random.default_rng(31).standard_normal((n_rows, n_in)).astype(np.float32)
    given = prepared(Kernels("quantize_rows", "host"), x)
    expected = product(Kernels("matmul", "host"), "rows8", w, given, None)
    y = np.full((n_rows, n_out), np.nan, np.float32)
    plain.launch("plain", (n_rows,), (8,), [pack(np, w).struct, Struct(*given), y, n_out, n_in])
    np.testing.assert_array_equal(y, expected)


def test_the_order_of_threads_does_not_matter(activations: Kernels) -> None:
    x = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
    first = prepared(activations, x)
    for order in (1, 2, 3):
        for a, b in zip(first, prepared(activations, x, order=order), strict=True):
            np.testing.assert_array_equal(a, b)


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
    sizes = [np.int32(n) for n in (n_out, n_in, n_rows)]
    for clamped, name in enumerate(("swiglu_f32", "swiglu_clamped_f32")):
        expected, y = np.empty_like(parts[0]), np.full_like(parts[0], np.nan)
        elements.launch(name, (1,), (256,), [*parts, expected, np.int64(y.size)])
        matrices = [pack(np, gate).struct, pack(np, up).struct]
        arguments = [*matrices, Struct(*given), NO_GROUPS, *biases, y, *sizes, np.int32(clamped)]
        gate_up.launch(f"gate_up_{kind.lower()}", (2,), (160,), arguments, 2048 * -(-n_in // 256))
        np.testing.assert_array_equal(y, expected)
    expected, y = np.empty_like(parts[1]), np.full_like(parts[1], np.nan)
    elements.launch("gelu_f32", (1,), (256,), [parts[1], expected, np.int64(y.size)])
    arguments = [pack(np, up).struct, Struct(*given), biases[1], y, *sizes]
    gate_up.launch(f"up_gelu_{kind.lower()}", (3,), (96,), arguments, 1024 * -(-n_in // 256))
    np.testing.assert_array_equal(y, expected)


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
    sizes = [np.int32(n) for n in (48, 32, sum(n_outs), n_in, n_rows)]
    arguments = [*structs, Struct(*given), *biases, *[None] * (3 - n_matrices), y, *sizes]
    Kernels("qkv", place).launch(f"qkv_{kind.lower()}", (3,), (64,), arguments, 1024 * -(-n_in // 256))
    np.testing.assert_array_equal(y, np.concatenate(expected, axis=1))
