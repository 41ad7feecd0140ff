"""A capture: the intermediate tensors that an engine computed for a prompt, live, recorded or dumped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOGITS = "result_output"


@dataclass(frozen=True)
class Capture:
    """The tensors of one run of one prompt, from position 0. `tensors`: full name → array in NumPy order.

    source: the file that it comes from. model_sha256: the hash of the GGUF file, if the engine gives it.
    complete: whether the engine finished writing.
    """

    source: Path
    engine: str
    ids: list[int]
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    model_sha256: str | None = None
    numerics: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True


def sha256_of_file(path: Path, progress: Callable[[int], object] = lambda n_bytes: None) -> str:
    """The SHA-256 of a file in hexadecimal. progress: called with the number of bytes of every piece read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()
