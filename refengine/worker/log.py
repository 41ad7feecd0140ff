"""The worker's log: one JSON object a line on stderr; words on a terminal.

Nothing that a client wrote or a model said goes in: callers give lengths, counts and hashes. Any thread may log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from refengine.errors import one_line

EVENTS = {"startup", "model_load_start", "model_load_progress", "model_load_complete", "ready", "shutdown"} | {
    "execute_start",
    "execute_end",
    "error",
}


def now_rfc3339() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def prompt_facts(prompt: str) -> dict[str, Any]:
    """What may be logged of a prompt."""
    return {"prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(), "prompt_chars": len(prompt)}


class Log:
    """stream: stderr unless a test says otherwise."""

    def __init__(self, worker_id: str, model_ref: str, gpu_device: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._common = {"worker_id": worker_id, "model_ref": model_ref, "gpu_device": gpu_device}
        self._lock = threading.Lock()
        self.for_people = self._stream.isatty()

    def __call__(self, event: str, level: str = "INFO", **fields: Any) -> None:
        """One line. level: INFO, WARNING, ERROR or CRITICAL."""
        assert event in EVENTS, event
        if self.for_people:
            words = " ".join(f"{k}={v}" for k, v in fields.items() if v is not None)
            line = one_line(f"{datetime.now():%H:%M:%S} {level:8} {event} {words}")
        else:
            head = {"ts": now_rfc3339(), "level": level, "event": event}
            line = json.dumps({**head, **self._common, **fields}, default=str)
        # Whoever read the log may have gone: serving goes on.
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(line, file=self._stream, flush=True)

    def failure(self, error: BaseException, **fields: Any) -> None:
        """An unexpected error: its kind and where it happened. Not its message, which may quote a request."""
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
        self("error", "ERROR", **fields, kind=type(error).__name__, where=where)
