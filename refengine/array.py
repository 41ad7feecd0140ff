"""The type of the arrays that the code computes with: NumPy's on the CPU, CuPy's on a GPU."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
"""An array of any shape and type, as NumPy's annotations describe it.

CuPy has no annotations, but its arrays have all of NumPy's methods and operators that refengine uses. So code that
takes an `Array` works on both; it gets the array module as `xp`. `to_numpy` copies an array of either kind to the host.
"""
