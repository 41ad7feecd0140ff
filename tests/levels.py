"""How much of a long test runs: all of it in CI, a part of it every day."""

import os
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

# On the CPU, away from CI, a dense model and a mixture of experts stand for these architectures.
CI_ONLY = ("llama", "qwen3", "phi3", "gpt2")

IN_CI = bool(os.environ.get("CI"))


def in_ci(whole: T, otherwise: T) -> T:
    """The size of a search or the list of cases: `whole` where the environment variable CI is set, else `otherwise`."""
    return whole if IN_CI else otherwise


def ci_only(names: Iterable[str], only: Collection[str]) -> list[Any]:
    """Names as parameters of a test; it runs for those of `only` in CI alone."""
    return [pytest.param(name, marks=pytest.mark.ci if name in only else ()) for name in names]


def mostly_in_ci(names: dict[str, str], *more: str) -> list[Any]:
    """Parameters for models by their architecture; those of CI_ONLY, and of more architectures, run in CI only."""
    return ci_only(names.values(), {name for arch, name in names.items() if arch in (*CI_ONLY, *more)})
