"""The folder in which compiled kernels are kept, and files that appear there whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$REFENGINE_CACHE, or `refengine` in the user's cache folder. Made where it is missing."""
    given = os.environ.get("REFENGINE_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "refengine"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts: str) -> str:
    """What a compilation depends on, as a name."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def write_whole(path: Path, content: bytes) -> None:
    """Another process sees all of the file or none of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
