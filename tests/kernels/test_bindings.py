"""Bindings refuse arrays that a kernel would read or write out of bounds, and every kernel file has its binding."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import refengine.cuda.kernels
from refengine.cuda.kernels import (
    activation,
    attention,
    attention_step,
    embedding,
    few_rows,
    matmul,
    moe,
    norm,
    quantize_rows,
    rope,
    router,
)
from refengine.cuda.kernels.attention import PagedRows, Projections, Rotation
from refengine.cuda.kernels.few_rows import Activation
from refengine.cuda.kernels.moe import Groups
from refengine.cuda.kernels.quantize_rows import Converted, RowNorm, Rows
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import names
from refengine.errors import KernelError

N, N_IN, N_OUT = 3, 64, 32


def test_every_kernel_file_has_a_binding_and_tests_of_its_name() -> None:
    modules = {path.stem for path in Path(refengine.cuda.kernels.__path__[0]).glob("*.py")}
    assert modules - {"__init__", "shapes"} == set(names()) - {"one_row"}  # few_rows.py binds that as well
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(names()) <= tests


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def matrix(*shape: int, kind: str = "Q8_0") -> PackedMatrix:
    return PackedMatrix("blk.0.w", GGMLQuantizationType[kind], shape or (N_OUT, N_IN), np.empty(0, np.uint8))


def rows(n: int = N, n_in: int = N_IN) -> Rows:
    return Rows(n, None, converted(n, n_in))


def converted(n: int = N, n_in: int = N_IN, *, halves: bool = False) -> Converted:
    return Converted.empty(np, n, n_in, halves=halves)


def cache(head_dim: int = 32) -> PagedRows:
    return PagedRows(np.zeros((2, 1, 64, head_dim), np.float16), np.zeros((2, 1, 64), np.uint8))


Q, Y = f32(N, 2, 32), f32(N, 64)
GROUPS = Groups(i32(4, 3), i32(N), i32(N), 8)
PARTS = Projections((f32(N * 64), f32(N * 32), f32(N * 32)), (64, 32, 32))
STEP: dict[str, Any] = {"scale": 1.0, "window": 0, "sinks": None}


def step(
    parts: Projections = PARTS, tables: Any = None, of_cache: Any = None, partial: Any = None, arrived: Any = None
) -> tuple[Any, ...]:
    """Arguments of `attention_step`, all but one of which fit."""
    caches = (of_cache or cache(), of_cache or cache())
    space = f32(N, 2, 1, 34) if partial is None else partial
    given = (i32(N), i32(N, 2) if tables is None else tables, *caches, space, i32(N) if arrived is None else arrived)
    return (parts, Rotation(None, None, True), *given, Y)


REFUSED: dict[str, tuple[Callable[..., None], tuple[Any, ...], dict[str, Any], str]] = {
    "sizes of elements": (activation.add, (f32(4), f32(5), f32(4)), {}, "add_f32: shapes .* all to have the same size"),
    "embedding": (embedding.embedding, (matrix(), i32(N), f32(N, 32)), {},
                  r"blk\.0\.w: the rows' array has the shape \(3, 32\), expected \(3, 64\)"),
    "squares of floats": (embedding.embedding, (matrix(kind="F32"), i32(N), f32(N, 64), f32(N, 4)), {},
                          r"blk\.0\.w: rows of F32 are stored as they are"),
    "output": (matmul.linear, (rows(), matrix(), f32(2, N_OUT)), {},
               r"blk\.0\.w: the output has the shape \(2, 32\), expected \(3, 32\)"),
    "bias": (matmul.linear, (rows(), matrix(), f32(N, N_OUT)), {"bias": f32(16)},
             r"blk\.0\.w: the bias has the shape \(16,\), expected \(32,\)"),
    "residual": (matmul.linear, (rows(), matrix(), f32(N, N_OUT)), {"residual": f32(N, 8)}, "the residual has"),
    "width": (matmul.linear, (rows(n_in=544), matrix(), f32(N, N_OUT)), {},
              r"blk\.0\.w: the rows' array has the shape \(3, 3, 512\), expected \(3, 1, 512\)"),
    "halves": (matmul.linear, (Rows(N, None, converted(halves=True)), matrix(), f32(N, N_OUT)), {},
               r"blk\.0\.w: the product reads integers, found halves"),
    "integers": (matmul.linear, (rows(), matrix(kind="F16"), f32(N, N_OUT)), {}, "reads halves, found integers"),
    "both": (few_rows.multiply, (rows(), [matrix(), matrix(kind="F16")], [None, None], f32(N, 2 * N_OUT)), {},
             r"NONE does not support 3 rows, Q8_0 \(32, 64\), F16"),
    "squares": (few_rows.multiply, (Rows(N, f32(N, N_IN), norm=RowNorm(f32(N_IN), 0.0)), [matrix()], [None],
                f32(N, N_OUT)), {}, "a norm reads the squares of its rows, found none"),
    "floats": (matmul.linear, (rows(), matrix(kind="F32"), f32(N, N_OUT)), {}, r"reads floats .* found none"),
    "experts": (matmul.linear, (rows(), matrix(4, N_OUT, N_IN), f32(N, N_OUT)),
                {"groups": GROUPS, "bias": f32(N_OUT)}, r"the bias has the shape \(32,\), expected \(4, 32\)"),
    "gate and up": (few_rows.multiply, (rows(), [matrix(), matrix(48, N_IN)], [None, None], f32(N, N_OUT)),
                    {"activation": Activation.SWIGLU},
                    r"SWIGLU does not support 3 rows, Q8_0 \(32, 64\), Q8_0 \(48, 64\)"),
    "many rows": (few_rows.multiply, (rows(9), [matrix()], [None], f32(9, N_OUT)), {}, "does not support 9 rows"),
    "gelu": (few_rows.multiply, (rows(), [matrix(kind="F32")], [None], f32(N, N_OUT)),
             {"activation": Activation.GELU}, r"GELU does not support 3 rows, F32 \(32, 64\)"),
    "part of a tile": (few_rows.multiply, (rows(), [matrix(24, N_IN), matrix()], [None, None], f32(N, 24 + N_OUT)), {},
                       r"with NONE does not support 3 rows, Q8_0 \(24, 64\), Q8_0"),
    "part of a block": (quantize_rows.quantize_rows, (Rows(N, f32(N, 48)), converted()), {},
                        "rows of 48 are not a multiple"),
    "sums": (quantize_rows.quantize_rows, (Rows(N, f32(N, 64)), replace(converted(), sums=i32(N, 1, 8))), {},
             r"the sums' array has the shape \(3, 1, 8\), expected \(3, 1, 16\)"),
    "squares of normed rows": (quantize_rows.quantize_rows, (Rows(N, f32(N, N_IN), norm=RowNorm(f32(N_IN), 0.0),
                               squares=f32(N, 3)), converted()), {}, r"the rows' squares has the shape \(3, 3\)"),
    "weight of a norm": (quantize_rows.quantize_rows, (Rows(N, f32(N, N_IN), norm=RowNorm(f32(32), 0.0),
                         squares=f32(N, 4)), converted()), {}, r"the norm's weight has the shape \(32,\)"),
    "nothing to convert": (quantize_rows.quantize_rows, (Rows(N, None), converted()), {}, "there are no floats"),
    "norm": (norm.rms_norm, (f32(N, 64), f32(64), 1e-5, f32(N, 32)), {}, "rms_norm_f32: the output has the shape"),
    "norm's rows": (norm.rms_norm_rows, (f32(N, 64), f32(64), 1e-5, rows(2)), {}, "rms_norm_rows: the rows' array"),
    "rope": (rope.rope, (Q, (f32(N, 1, 16), f32(N, 1, 16)), f32(N, 2, 16)), {"neox": True}, "the output has the shape"),
    "strides": (attention_step.attention_step, step(Projections(PARTS.parts, (64, 64, 32))), STEP,
                "3 rows of 1 heads of 32, 64 floats apart, do not fit 96"),
    "prompt's strides": (rope.rope_append, (*step(Projections(PARTS.parts, (64, 64, 32)))[:4], Q, cache(), cache()), {},
                         "rope_append: 3 rows of 1 heads of 32, 64 floats apart, do not fit 96"),
    "another cache": (attention_step.attention_step, step(of_cache=cache(64)), STEP,
                      "2 heads of 32 over a cache of 1 of 64"),
    "entries": (attention_step.attention_step, step(partial=f32(N, 2, 2, 34)), STEP,
                r"the work space has the shape \(3, 2, 2, 34\), expected \(3, 2, 1, 34\)"),
    "tables": (attention_step.attention_step, step(tables=i32(2, 2)), STEP,
               r"the tables' array has the shape \(2, 2\), expected \(3, 2\)"),
    "counters": (attention_step.attention_step, step(arrived=i32(2)), STEP, "2 counters, 3 are needed"),
    "slots": (attention.kv_append, (f32(N, 1, 32), np.zeros(2, np.int64), cache()), {},
              r"kv_append: the new rows' array has the shape \(3, 1, 32\), expected \(2, 1, 32\)"),
    "route": (moe.route, (f32(N, 40), i32(N), i32(N, 33), f32(N, 33)), {}, "route: 33 of 40 .* at most 32"),
    "groups": (moe.group_experts, (i32(N, 1), 4, 1, Groups(i32(2, 3), i32(N), i32(N), 8)), {},
               r"the groups' array has the shape \(2, 3\), expected \(3, 3\)"),
    "router": (router.route, (f32(N, N_IN), None, 0.0, matrix(), None, i32(N), i32(1), f32(N, N_OUT), f32(N, 2),
               GROUPS), {}, r"blk\.0\.w: the router does not support Q8_0 \(32, 64\), 3 rows, 2 experts each"),
    "router's norm": (router.route, (f32(N, N_IN), f32(32), 0.0, matrix(kind="F32"), None, i32(N), i32(1),
                      f32(N, N_OUT), f32(N, 2), GROUPS), {}, r"blk\.0\.w: the norm's weight has the shape \(32,\)"),
    "shares": (moe.combine, (f32(6, 8), f32(N, 3), f32(N, 8), f32(N, 8)), {}, "combine: the array of outputs has"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_do_not_fit_are_refused_with_what_was_expected(case: str) -> None:
    binding, arguments, named, message = REFUSED[case]
    with pytest.raises(KernelError, match=message):
        binding(Kernels("host"), *arguments, **named)
