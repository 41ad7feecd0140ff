"""The worker's log: one JSON object a line on stderr; words on a terminal.

Nothing that a client wrote or a model said goes in: callers give lengths, counts and hashes. Any thread may log, and in
a worker none waits for whoever reads the log.
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
QUEUE_LINES = 4096  # that wait for a reader; what comes then is lost
LAST_LINES_S = 1.0  # for a reader to take them when the process ends


def now_rfc3339() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def prompt_facts(prompt: str) -> dict[str, Any]:
    """What may be logged of a prompt."""
    return {"prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "prompt_chars": len(prompt)}


class Log:
    """stream: stderr unless a test says otherwise. Lines are written by whoever logs, until `write_behind`."""

    def __init__(self, worker_id: str, model_ref: str, gpu_device: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._common = {"worker_id": worker_id, "model_ref": model_ref, "gpu_device": gpu_device}
        self._lock = threading.Lock()
        self._writer: _Writer | None = None
        self.for_people = self._stream.isatty()

    def write_behind(self) -> None:
        """From here on by a thread of its own, which has some time for what is left when the process ends.

        Except into a file, which waits for no reader: there a line stands whatever happens next.
        """
        if stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
            return
        self._writer = _Writer(self._stream, self._lost)
        atexit.register(self.drain)

    def drain(self) -> None:
        """Wait until all is written, at most LAST_LINES_S."""
        if self._writer is not None:
            self._writer.drain(LAST_LINES_S)

    def __call__(self, event: str, level: str = "INFO", **fields: Any) -> None:
        """One line. level: INFO, WARNING, ERROR or CRITICAL."""
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
        return self._line("error", "WARNING", {"source": "log", "message": "nobody read it", "lines_lost": n_lines})

    def _write_at_once(self, line: str) -> None:
        # Whoever read the log may have gone: serving goes on.
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(line, file=self._stream, flush=True)

    def failure(self, error: BaseException, **fields: Any) -> None:
        """An unexpected error: its kind and where it happened. Not its message, which may quote a request."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
        self("error", "ERROR", **fields, kind=type(error).__name__, where=where)


class _Writer:
    """Takes lines and writes them in turn, in a thread. Those that find the queue full are lost.

    lost: makes the line that says how many were, which comes in their place.
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
        """Wait until all is written, at most so long."""
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
                with contextlib.suppress(OSError, ValueError):  # as above
                    self._put(text.encode(self._stream.encoding, "backslashreplace"))

    def _put(self, content: bytes) -> None:
        """Not through the stream, whose buffer the interpreter wants to have when it ends, with a reader or without."""
        while content:
            content = content[os.write(self._stream.fileno(), content) :]


def _together(lines: Sequence[str]) -> Iterator[str]:
    """As many at a time as a pipe takes whole or not at all."""
    text = ""
    for line in lines:
        if text and len(text) + len(line) >= PIPE_BUF:
            yield text
            text = ""
        text += line + "\n"
    yield text
