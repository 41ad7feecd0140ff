"""The type of an array that the code computes with: NumPy's on the CPU, CuPy's on a GPU."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
"""An array of any shape and type, as NumPy's annotations describe it.

CuPy has no annotations, and its arrays have the methods and operators that refengine uses of NumPy's: code that takes
an `Array` works on both, by the array module `xp` that is handed in. `to_numpy` copies either to the host.
"""
