"""The folder in which compiled kernels are kept, and files that appear there whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from refengine.errors import DeviceError


def cache_folder() -> Path:
    """$REFENGINE_CACHE, or `refengine` in the user's cache folder. Made where it is missing; else DeviceError."""
    given = os.environ.get("REFENGINE_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "refengine"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unusable(folder, e) from None
    return folder


def digest(*parts: str) -> str:
    """What a compilation depends on, as a name."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def write_whole(path: Path, content: bytes) -> None:
    """Another process sees all of the file or none of it. Raises DeviceError where it cannot be written."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as e:
        raise _unusable(path.parent, e) from None


def _unusable(folder: Path, error: OSError) -> DeviceError:
    return DeviceError(
        f"compiled kernels cannot be kept in {folder} ({error.strerror or error}): "
        "set REFENGINE_CACHE to a folder that can be written, or that has them (refengine compile)"
    )
