"""The worker's log on stderr: one JSON object per line, or plain text on a terminal.

The log never contains text from a client or a model: callers pass lengths, counts and hashes. Any thread may log. In a
worker, no thread waits for the reader of the log.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from select import PIPE_BUF
from typing import Any, TextIO

from refengine.errors import one_line

EVENTS = {"startup", "model_load_start", "model_load_progress", "model_load_complete", "ready", "shutdown"} | {
    "execute_start",
    "execute_end",
    "error",
}
QUEUE_LINES = 4096  # lines that may wait for a reader; further lines are dropped
LAST_LINES_S = 1.0  # how long the end of the process waits for a reader to take the last lines


def now_rfc3339() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def prompt_facts(prompt: str) -> dict[str, Any]:
    """The fields of a prompt that may be logged: its SHA-256 hash and its length."""
    return {"prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "prompt_chars": len(prompt)}


class Log:
    """Writes log lines to stderr, or to `stream` in tests. The calling thread writes them, until `write_behind`."""

    def __init__(self, worker_id: str, model_ref: str, gpu_device: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._common = {"worker_id": worker_id, "model_ref": model_ref, "gpu_device": gpu_device}
        self._lock = threading.Lock()
        self._writer: _Writer | None = None
        self.for_people = self._stream.isatty()

    def write_behind(self) -> None:
        """From now on, let a separate thread write the lines; at exit it gets LAST_LINES_S seconds for the rest.

        If the stream is a regular file, the calling threads still write: a file never blocks them, and no line is lost.
        """
        if stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
            return
        self._writer = _Writer(self._stream, self._lost)
        atexit.register(self.drain)

    def drain(self) -> None:
        """Wait until all lines are written, at most LAST_LINES_S seconds."""
        if self._writer is not None:
            self._writer.drain(LAST_LINES_S)

    def __call__(self, event: str, level: str = "INFO", **fields: Any) -> None:
        """Log one line. level: INFO, WARNING, ERROR or CRITICAL."""
        line = self._line(event, level, fields)
        if self._writer is None:
            self._write_at_once(line)
        else:
            self._writer(line)

    def _line(self, event: str, level: str, fields: dict[str, Any]) -> str:
        assert event in EVENTS, event
        if self.for_people:
            words = " ".join(f"{k}={v}" for k, v in fields.items() if v is not None)
            return one_line(f"{datetime.now():%H:%M:%S} {level:8} {event} {words}")
        head = {"ts": now_rfc3339(), "level": level, "event": event}
        return json.dumps({**head, **self._common, **fields}, default=str)

    def _lost(self, n_lines: int) -> str:
        message = "log lines were dropped because nobody read them"
        return self._line("error", "WARNING", {"source": "log", "message": message, "lines_lost": n_lines})

    def _write_at_once(self, line: str) -> None:
        # If the reader of the log is gone, the worker continues.
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(line, file=self._stream, flush=True)

    def failure(self, error: BaseException, **fields: Any) -> None:
        """Log an unexpected exception: its type and its place, but not its message, which may quote a request."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
        self("error", "ERROR", **fields, kind=type(error).__name__, where=where)


class _Writer:
    """Writes lines in a thread, in their order. Drops lines that arrive while the queue is full.

    lost: makes the line that reports the number of dropped lines.
    """

    def __init__(self, stream: TextIO, lost: Callable[[int], str]) -> None:
        self._stream, self._make_lost = stream, lost
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._n_lost = 0
        self._is_writing = False
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def __call__(self, line: str) -> None:
        with self._changed:
            if len(self._lines) < QUEUE_LINES:
                self._lines.append(line)
            else:
                self._n_lost += 1
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Wait until all lines are written, at most this many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._is_writing, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                self._is_writing = True
                lines, self._lines = self._lines, []
                n_lost, self._n_lost = self._n_lost, 0
            if n_lost:
                lines.append(self._make_lost(n_lost))
            for text in _together(lines):
                with contextlib.suppress(OSError, ValueError):  # the reader of the log is gone
                    self._put(text.encode(self._stream.encoding, "backslashreplace"))

    def _put(self, content: bytes) -> None:
        """Write to the file descriptor. The stream has a buffer, and the interpreter would wait for it at exit."""
        while content:
            content = content[os.write(self._stream.fileno(), content) :]


def _together(lines: Sequence[str]) -> Iterator[str]:
    """Join lines into texts of at most PIPE_BUF bytes, which a pipe takes in one atomic write."""
    text = ""
    for line in lines:
        if text and len(text) + len(line) >= PIPE_BUF:
            yield text
            text = ""
        text += line + "\n"
    yield text
