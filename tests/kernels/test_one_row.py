"""Kernels for one plan: the bits of the kernel that is right for all plans; and a plan is what the kernels read."""

from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pytest

from refengine.cuda.kernels.few_rows import Activation, Has, Matrix, Plan
from refengine.cuda.runtime.source import read_source
from tests.kernels.matrices import random_matrix
from tests.kernels.products import few_rows, prepared_for
from tests.kernels.runner import Kernels

# Types of the matrices, outputs of each, columns, rows, activation, whether there is a norm, warps and blocks. Tiles
# without their last outputs, blocks with different numbers of tiles, and segments that are not whole are among them.
CASES: dict[str, tuple[tuple[str, ...], tuple[int, ...], int, int, Activation, bool, int, int]] = {
    "norm, gate and up": (("Q4_K", "Q4_K"), (72,), 768, 1, Activation.SWIGLU, True, 8, 3),
    "three types, biases": (("Q5_0", "Q8_0", "Q4_1"), (48, 32, 19), 1120, 1, Activation.NONE, True, 5, 4),
    "more warps than segments": (("Q6_K",), (80,), 512, 1, Activation.NONE, False, 8, 5),
    "many segments": (("Q4_0",), (21,), 1376, 1, Activation.GELU, False, 2, 1),
    "two of mxfp4": (("MXFP4", "MXFP4"), (32,), 1056, 1, Activation.SWIGLU_CLAMPED, True, 3, 2),
    "halves": (("F16",), (40,), 544, 1, Activation.NONE, True, 3, 2),
    "two rows": (("Q4_K",), (40,), 768, 2, Activation.NONE, True, 3, 2),
    "rows by segment": (("Q4_K", "Q6_K"), (72,), 768, 8, Activation.SWIGLU, False, 4, 3),
    "fewer outputs than threads": (("Q4_K",), (64,), 768, 2, Activation.NONE, False, 8, 4),
    "rows by entry": (("Q5_1",), (112,), 544, 5, Activation.NONE, False, 4, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_for_one_plan_has_the_same_bits(case: str, activations: Kernels, few: Kernels, place: str) -> None:
    kinds, outs, n_in, n_rows, activation, norm, warps, blocks = CASES[case]
    rng = np.random.default_rng(5)
    matrices = [random_matrix(kind, (outs[i % len(outs)], n_in), 6 + i) for i, kind in enumerate(kinds)]
    x = rng.standard_normal((n_rows, n_in)).astype(np.float32)
    given: list[Any]
    if n_rows > 2:
        given = prepared_for(matrices[0], activations, x)
    else:
        of_x, weight = np.empty((n_rows, n_in // 16), np.float32), rng.standard_normal(n_in).astype(np.float32)
        Kernels("norm", place).launch("row_squares", (n_rows, -(-n_in // 256)), (256,), [x, of_x, n_in])
        given = [None, None, None, x, *((of_x, weight) if norm else (None, None))]
    n_out = outs[0] if activation.gated else sum(outs)
    has_bias = case not in ("more warps than segments", "rows by entry")
    biases = [rng.standard_normal(w.shape[0]).astype(np.float32) if has_bias else None for w in matrices]
    residual = None if has_bias else rng.standard_normal((n_rows, n_out)).astype(np.float32)
    chunk = 1 if case == "rows by entry" else 8
    made = []
    for for_plan in (False, True):
        squares = None if has_bias else np.zeros((n_rows, n_out // 16), np.float32)
        y = few_rows(
            few,
            matrices,
            given,
            biases,
            activation=activation,
            warps=warps,
            blocks=blocks,
            chunk=chunk,
            residual=residual,
            eps=1e-5,
            squares=squares,
            for_plan=for_plan,
        )
        made.append((y, squares))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert not np.isnan(made[0][0]).any()
    if not has_bias:
        np.testing.assert_array_equal(made[0][1], made[1][1])


def test_the_kernels_read_the_fields_of_a_plan_in_their_order() -> None:
    w = random_matrix("Q4_K", (48, 768), 1)
    plan = Plan.of([Matrix(w.type, 48)], 768, Activation.NONE, Has(0), blocks=3, warps=4, shift=0, chunk=1)
    for file in ("one_row", "few_rows"):
        (parameter,) = (p for p in read_source(file).kernels[file] if p.kind == "Plan")
        assert [member.name for member in parameter.members] == [field.name for field in fields(plan)]
    assert plan.struct.words == astuple(plan)
    assert dict(plan.constants) == {"TYPES": "12", "PLAN": ", ".join(map(str, astuple(plan)))}
