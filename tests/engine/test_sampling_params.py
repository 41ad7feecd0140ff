"""SamplingParams: what is accepted and how a refusal reads."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from refengine.engine.sampling import SamplingParams, choose_seed
from refengine.errors import RequestError

NAN, INF = float("nan"), float("inf")
HUGE = 10**5000  # too long for Python to print

REFUSED: dict[str, list[Any]] = {
    "temperature": [-0.001, 2.001, NAN, INF, -INF, True, "1", None, 10**400, np.float32("nan")],
    "top_k": [-1, 1.0, True, None, "40", NAN],
    "top_p": [-0.001, 1.001, NAN, INF, False, "0.9", None],
    "min_p": [-0.001, 1.001, NAN, INF, False, "0.1", None],
    "repetition_penalty": [0.0, -0.1, 2.001, NAN, INF, True, None],
    "seed": [-1, 2**64, 1.0, True, "7", HUGE],
    "max_tokens": [0, -1, 1.0, True, None],
    "stop": ["END", ["a"] * 5, [""], ["a", 1], None, [b"a"], {"a"}, [HUGE]],
}
ACCEPTED: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 2, 2.0, 1e-320, np.float32(0.5)],
    "top_k": [0, 1, 10**6, np.int64(5)],
    "top_p": [0, 0.0, 1, 1.0],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [1e-9, 1, 2.0],
    "seed": [None, 0, 2**64 - 1],
    "max_tokens": [1, 2048, 10**6],
    "stop": [(), [], ["a", "bc", "é", "\n"], ("x",)],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{i}") for name, values in table.items() for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_params_refuse_naming_field_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: given ")
    assert ", allowed " in message
    assert len(message) < 200
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_params_accept_the_whole_range(name: str, value: Any) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == (tuple(value) if name == "stop" else value)
    assert kept is None or type(kept) in (int, float, tuple)


def test_params_say_what_was_given() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=3)
    assert str(caught.value) == "temperature: given 3, allowed a number from 0 to 2"


def test_params_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_params_defaults_are_those_of_the_worker() -> None:
    # W-1300
    assert SamplingParams() == SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=None, max_tokens=2048, stop=()
    )


def test_params_check_for_model_limits_top_k_and_stop_tokens() -> None:
    SamplingParams(top_k=300, stop=("x" * 32,)).check_for_model(300, len)
    with pytest.raises(RequestError, match="top_k: given 301, allowed an integer from 0 to 300"):
        SamplingParams(top_k=301).check_for_model(300, len)
    with pytest.raises(RequestError, match=r"stop: given .* up to 32 tokens; this one has 33"):
        SamplingParams(stop=("ok", "x" * 33)).check_for_model(300, len)


def test_choose_seed_is_a_uint64_and_differs() -> None:
    seeds = [choose_seed() for _ in range(64)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert len(set(seeds)) == 64
    assert max(seeds) >= 2**56  # all 8 bytes are used; fails by chance once in 2**512
