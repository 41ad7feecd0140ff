"""The cache folder of compiled kernels. Files are written atomically."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from refengine.errors import DeviceError


def cache_folder() -> Path:
    """$REFENGINE_CACHE, or `refengine` in the user's cache folder; created if missing. Raises DeviceError."""
    own = os.environ.get("REFENGINE_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "refengine"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unusable(folder, e) from None
    return folder


def can_store() -> bool:
    """Whether files can be stored in the cache folder. Raises DeviceError if there is none."""
    return os.access(cache_folder(), os.W_OK)


def digest(*parts: str) -> str:
    """A short hash of all inputs of a compilation, for a file name."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: other processes see all of it or nothing. Raises DeviceError if it cannot be written."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as e:
        raise _unusable(path.parent, e) from None


def _unusable(folder: Path, error: OSError) -> DeviceError:
    return DeviceError(
        f"compiled kernels cannot be stored in {folder} ({error.strerror or error}): "
        "set REFENGINE_CACHE to a writable folder, or to one that has them already (refengine compile)"
    )
