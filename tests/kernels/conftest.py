"""Kernel files that several test modules launch."""

import pytest

from tests.kernels.op_twins import OpsThere
from tests.kernels.runner import Kernels


@pytest.fixture(scope="module")
def there(place: str) -> OpsThere:
    return OpsThere(place)


@pytest.fixture(scope="module")
def activations(place: str) -> Kernels:
    return Kernels("quantize_rows", place)


@pytest.fixture(scope="module")
def matmul(place: str) -> Kernels:
    return Kernels("matmul", place)


@pytest.fixture(scope="module")
def few(place: str) -> Kernels:
    return Kernels("few_rows", place)
