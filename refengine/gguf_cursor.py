"""Checked reading from a memory-mapped GGUF file: every length is compared with what is left before it is used.

Does: opening and mapping, integers, strings and names at a position, the form of an error about a malformed file.
Does not know: what the fields of a GGUF file are (`gguf_parse.py`).
"""

import mmap
import os
import stat
import struct
from pathlib import Path

from refengine.errors import GGUFError

MAX_STRING_BYTES = 1 << 24  # the largest real string is a chat template
INT64_MAX = (1 << 63) - 1

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


def malformed(path: Path, offset: int, message: str) -> GGUFError:
    """The error of a malformed file: path first, byte offset last, one line."""
    return GGUFError(f"{path}: {message} (byte {offset})")


def quoted(text: str) -> str:
    """`text` in quotes, escaped and cut to a length that an error message can bear."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."


def map_file(path: Path) -> tuple[mmap.mmap, int]:
    """The read-only mapping of a regular file, and its size in bytes. Raises GGUFError where there is none to map."""
    # O_NONBLOCK: opening a named pipe that nobody writes to must not hang; it has no effect on a regular file.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        if path.is_dir():  # where directories cannot be opened at all
            raise GGUFError(f"{path}: is a directory; expected a GGUF file") from error
        raise GGUFError(f"{path}: cannot open: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{path}: is a directory; expected a GGUF file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{path}: is not a regular file; expected a GGUF file")
        if status.st_size == 0:
            raise malformed(path, 0, "the file is empty; expected the magic 'GGUF'")
        try:
            return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), status.st_size
        except (OSError, ValueError, OverflowError) as error:
            raise GGUFError(f"{path}: cannot map {status.st_size} bytes into memory: {error}") from error
    finally:
        os.close(descriptor)


class Cursor:
    """A position in the mapping; every read checks that the file goes on so far."""

    def __init__(self, path: Path, file_map: mmap.mmap, size: int) -> None:
        self.path = path
        self.map = file_map
        self.size = size
        self.pos = 0

    def error(self, offset: int, message: str) -> GGUFError:
        return malformed(self.path, offset, message)

    def advance(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes`, and return where they begin."""
        start = self.pos
        if n_bytes > self.size - start:
            raise self.error(
                start, f"the file ends inside {what}: {n_bytes} bytes needed, {self.size - start} are left"
            )
        self.pos = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32(self.map, self.advance(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64(self.map, self.advance(8, what))[0])

    def count(self, what: str, limit: int, min_bytes: int) -> int:
        """A number of items, at most `limit`, each of which takes at least `min_bytes` of what is left."""
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
        text_start = self.advance(n_bytes, what)
        try:
            return self.map[text_start : self.pos].decode()
        except UnicodeDecodeError as error:
            raise self.error(text_start + error.start, f"{what} is not valid UTF-8: {error.reason}") from None

    def strings(self, n: int, what: str) -> list[str]:
        """`n` strings, walked once; the vocabularies are the bulk of a file's metadata."""
        file_map, size, pos = self.map, self.size, self.pos
        texts: list[str] = []
        add = texts.append
        try:
            for _ in range(n):
                start = pos + 8
                n_bytes = _U64(file_map, pos)[0]
                end = start + n_bytes
                if end > size or n_bytes > MAX_STRING_BYTES:
                    break
                add(file_map[start:end].decode())
                pos = end
        except (UnicodeDecodeError, struct.error):
            pass  # the checked reader below meets the same string again and says what is wrong with it
        self.pos = pos
        while len(texts) < n:
            texts.append(self.string(f"element {len(texts)} of {what}"))
        return texts

    def name(self, what: str, limit: int) -> str:
        """A key or a tensor name: not empty, no NUL (C code would cut it there)."""
        start = self.pos
        text = self.string(what, limit)
        if not text:
            raise self.error(start, f"{what} is empty")
        if "\0" in text:
            raise self.error(start, f"{what}, {quoted(text)}, contains NUL")
        return text


def signed(n: int) -> str:
    """An unsigned 64-bit count; where ggml would read it as negative, say so."""
    return f"{n}" if n <= INT64_MAX else f"{n} (negative: {n - (1 << 64)} as int64)"
