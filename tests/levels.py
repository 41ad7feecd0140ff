"""How much of a long test runs: all of it in CI, a part of it every day."""

import os
from typing import TypeVar

T = TypeVar("T")

IN_CI = bool(os.environ.get("CI"))


def in_ci(whole: T, otherwise: T) -> T:
    """The size of a search or the list of cases: `whole` where the environment variable CI is set, else `otherwise`."""
    return whole if IN_CI else otherwise
