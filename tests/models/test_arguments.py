"""What `Model.forward` takes for ids and tensors, and what it refuses."""

from typing import Any

import numpy as np
import pytest

import refengine
from refengine.errors import RequestError, TraceError


@pytest.fixture(scope="module")
def model() -> refengine.Model:
    return refengine.load()


class Tensor:
    """What a torch tensor is to us: `detach`, `cpu`, `dtype`, NumPy's protocol, `tolist`."""

    dtype = "torch.float32"

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def detach(self) -> "Tensor":
        return self

    cpu = detach

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values

    def tolist(self) -> Any:
        return self.values.tolist()


def test_ids_are_lists_arrays_and_tensors(model: refengine.Model) -> None:
    expected = model.forward([1, 2, 3])
    given: list[Any] = [np.array([1, 2, 3]), np.array([1, 2, 3], np.int32), (1, 2, 3), Tensor(np.array([1, 2, 3]))]
    for ids in given:
        np.testing.assert_array_equal(model.forward(ids), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("hello", "text, expected token ids"),
        ([[1, 2], [3, 4]], r"\[1, 2\] among its token ids"),
        (np.zeros((2, 2), np.int64), r"\[0, 0\] among its token ids"),
        ([1.5], "1.5 among its token ids"),
        ([True], "True among its token ids"),
        (7, "expected one list of token ids"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(ids: Any, message: str, model: refengine.Model) -> None:
    with pytest.raises(RequestError, match=message):
        model.forward(ids)


def test_replacements_are_lists_and_tensors_too(model: refengine.Model) -> None:
    seen = refengine.Trace("^Vcur-1$")
    model.forward([1, 2], trace=seen)
    other = seen.result()["Vcur-1"] * 2
    expected = model.forward([1, 2], trace=refengine.Trace(replace={"Vcur-1": other}))
    replacements: list[Any] = [other.tolist(), Tensor(other), lambda x: x * 2]
    for value in replacements:
        found = model.forward([1, 2], trace=refengine.Trace(replace={"Vcur-1": value}))
        np.testing.assert_array_equal(found, expected)


def test_names_that_do_not_exist_are_refused_before_anything_is_computed(model: refengine.Model) -> None:
    for trace in (refengine.Trace(replace={"Qcur-33": np.zeros(1)}), refengine.Trace(breakpoints=["nothing"])):
        with pytest.raises(TraceError, match=r"no such tensor: (Qcur-33|nothing); this model has .*Qcur-0"):
            model.forward([1], trace=trace)
        assert not trace.seen
    generated = refengine.Trace(replace={"Qcur-33": np.zeros(1)})
    from refengine.engine.engine import single_sequence

    with pytest.raises(TraceError, match="Qcur-33"):
        single_sequence(model, [1], trace=generated)


def test_progress_is_told_after_each_chunk(model: refengine.Model) -> None:
    told: list[int] = []
    model.forward([1] * 10, chunk=4, progress=told.append)
    assert told == [4, 4, 2]
