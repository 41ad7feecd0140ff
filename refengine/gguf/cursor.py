"""Checked reading from a GGUF file: every length is compared with the remaining bytes before it is used.

Opens, maps and reads files, reads integers, strings and names, and makes the errors about malformed files.
The fields of a GGUF file are defined in `parse.py`.
"""

import contextlib
import mmap
import os
import stat
import struct
import weakref
from pathlib import Path

from refengine.errors import GGUFError

MAX_STRING_BYTES = 1 << 24  # the largest real string is a chat template
INT64_MAX = (1 << 63) - 1
WINDOW_BYTES = 1 << 20  # how much is read at a time

_U64 = struct.Struct("<Q").unpack_from


def malformed(path: Path, offset: int, message: str) -> GGUFError:
    """The error about a malformed file, on one line: the path first, the byte offset last."""
    return GGUFError(f"{path}: {message} (byte {offset})")


def quoted(text: str) -> str:
    """`text` in quotes, escaped, and shortened for an error message."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."


class OpenFile:
    """A regular file, opened read-only and mapped. `read_into` reads without the mapping.

    If the file shrinks, accessing a lost page of the mapping kills the process (SIGBUS), but `read_into` only raises.
    """

    size: int  # bytes, when it was opened
    map: mmap.mmap

    def __init__(self, path: Path) -> None:
        """Raises GGUFError if the file cannot be opened or mapped."""
        self.path = path
        # O_NONBLOCK: opening a named pipe without a writer must not block; it has no effect on a regular file.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._descriptor = os.open(path, flags)
        except (OSError, ValueError) as error:
            if path.is_dir():  # on systems where directories cannot be opened
                raise GGUFError(f"{path}: is a directory; expected a GGUF file") from error
            raise GGUFError(f"{path}: cannot open: {getattr(error, 'strerror', None) or error}") from error
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        try:
            self.size, self.map = self._mapped()
        except GGUFError:
            self._finalizer()
            raise

    def _mapped(self) -> tuple[int, mmap.mmap]:
        status = os.fstat(self._descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{self.path}: is a directory; expected a GGUF file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{self.path}: is not a regular file; expected a GGUF file")
        if status.st_size == 0:
            raise malformed(self.path, 0, "the file is empty; expected the magic 'GGUF'")
        try:
            return status.st_size, mmap.mmap(self._descriptor, status.st_size, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            raise GGUFError(f"{self.path}: cannot map {status.st_size} bytes into memory: {error}") from error

    def read_into(self, target: memoryview, offset: int, what: str) -> None:
        """Fill `target` with the bytes from `offset` on. what: describes them in error messages.

        Raises GGUFError if the file has become shorter or cannot be read, ValueError if it is closed.
        """
        if not self._finalizer.alive:
            raise ValueError(f"{self.path}: the file is closed")
        done = 0
        while done < len(target):
            try:
                n_bytes = os.preadv(self._descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise malformed(self.path, offset + done, f"cannot read {what}: {error.strerror or error}") from error
            if n_bytes == 0:
                message = f"the file has shrunk while it was read: {what} has {done} bytes, expected {len(target)}"
                raise malformed(self.path, offset, message)
            done += n_bytes

    def close(self) -> None:
        """Close the file and unmap it. While arrays still use the mapping, it is unmapped with the last of them."""
        self._finalizer()
        with contextlib.suppress(BufferError):
            self.map.close()


class Cursor:
    """A position in the file, which only moves forward. Every read checks that the file is long enough."""

    def __init__(self, file: OpenFile) -> None:
        self.path, self.size = file.path, file.size
        self.pos = 0
        self._file = file
        self._window, self._window_start = b"", 0  # the bytes read last, and their offset in the file

    def error(self, offset: int, message: str) -> GGUFError:
        return malformed(self.path, offset, message)

    def read(self, n_bytes: int, what: str) -> bytes:
        """Read the next `n_bytes`."""
        start = self.pos
        if n_bytes > self.size - start:
            raise self.error(
                start, f"the file ends inside {what}: {n_bytes} bytes needed, {self.size - start} are left"
            )
        if start + n_bytes > self._window_start + len(self._window):
            window = bytearray(min(max(n_bytes, WINDOW_BYTES), self.size - start))
            self._file.read_into(memoryview(window), start, "the metadata")
            self._window, self._window_start = bytes(window), start
        self.pos = start + n_bytes
        return self._window[start - self._window_start : self.pos - self._window_start]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.read(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.read(8, what), "little")

    def count(self, what: str, limit: int, min_bytes: int) -> int:
        """Read a number of items, at most `limit`, each of which needs at least `min_bytes` of the remaining bytes."""
        start = self.pos
        n = self.u64(f"the number of {what}")
        if n > limit:
            raise self.error(start, f"the number of {what} is {signed(n)}; expected at most {limit}")
        if n * min_bytes > self.size - self.pos:
            raise self.error(
                start,
                f"the number of {what} is {n}, which needs at least {n * min_bytes} bytes; "
                f"the file has {self.size - self.pos} left",
            )
        return n

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        start = self.pos
        n_bytes = self.u64(f"the length of {what}")
        if n_bytes > limit:
            raise self.error(start, f"the length of {what} is {signed(n_bytes)} bytes; expected at most {limit}")
        text = self.read(n_bytes, what)
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self.error(start + 8 + error.start, f"{what} is not valid UTF-8: {error.reason}") from None

    def strings(self, n: int, what: str) -> list[str]:
        """Read `n` strings. Fast, because vocabularies are the largest part of a file's metadata."""
        texts: list[str] = []
        while len(texts) < n:
            self._strings_in_window(texts, n)
            if len(texts) < n:  # the next string crosses the end of the window, or is malformed
                texts.append(self.string(f"element {len(texts)} of {what}"))
        return texts

    def _strings_in_window(self, texts: list[str], n: int) -> None:
        """Add the following strings, up to `n` in total, while they are well-formed and inside the window."""
        window, pos = self._window, self.pos - self._window_start
        size, add = len(window), texts.append
        try:
            for _ in range(n - len(texts)):
                start = pos + 8
                n_bytes = _U64(window, pos)[0]
                end = start + n_bytes
                if end > size or n_bytes > MAX_STRING_BYTES:
                    break
                add(window[start:end].decode())
                pos = end
        except (UnicodeDecodeError, struct.error):
            pass
        self.pos = self._window_start + pos

    def name(self, what: str, limit: int) -> str:
        """Read a key or a tensor name: not empty and without NUL, at which C code would end it."""
        start = self.pos
        text = self.string(what, limit)
        if not text:
            raise self.error(start, f"{what} is empty")
        if "\0" in text:
            raise self.error(start, f"{what}, {quoted(text)}, contains NUL")
        return text


def signed(n: int) -> str:
    """An unsigned 64-bit count as text, with a note if ggml would read it as negative."""
    return f"{n}" if n <= INT64_MAX else f"{n} (negative: {n - (1 << 64)} as int64)"
