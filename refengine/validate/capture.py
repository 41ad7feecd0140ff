"""What an engine computed for a prompt: its intermediate tensors, whether live, recorded or dumped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOGITS = "result_output"


@dataclass(frozen=True)
class Capture:
    """Tensors of one run of one prompt, from position 0. `tensors`: full name → array in NumPy order.

    source: the file it comes from. model_sha256: of the GGUF file, where the engine told. complete: whether the engine
    finished writing.
    """

    source: Path
    engine: str
    ids: list[int]
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    model_sha256: str | None = None
    numerics: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True
