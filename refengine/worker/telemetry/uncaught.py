"""Logs what would otherwise be printed to stderr: records of libraries' loggers, warnings, uncaught exceptions.

Logs their type and place but not their messages, which may quote a request: asyncio's contain the arguments of a
callback. Only refengine's own messages, and uvicorn's without their arguments, are known to be safe.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from typing import Any

from refengine.worker.telemetry.log import Log


class _ToLog(logging.Handler):
    """Sends log records of level WARNING and above to the worker's log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        fields = {"source": record.name, "message": _safe_message(record)}
        if error is not None:
            self._log.failure(error, **fields)
        else:
            where = [f"{record.filename}:{record.lineno} {record.funcName}"]
            self._log("error", record.levelname, **fields, where=where)


def _safe_message(record: logging.LogRecord) -> str | None:
    """The record's message if it cannot quote a request, else None."""
    library = record.name.partition(".")[0]
    if library == "refengine":
        return record.getMessage()
    return record.msg.strip() if library == "uvicorn" and isinstance(record.msg, str) else None


def log_uncaught(log: Log) -> None:
    """Install the handlers in the whole process."""
    logging.getLogger().handlers = [_ToLog(log)]

    def unhandled(error: BaseException | None, source: str) -> None:
        if error is not None and not isinstance(error, SystemExit):
            log.failure(error, source=source)

    def warning(
        message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        where = [f"{filename.rsplit('/', 1)[-1]}:{lineno}"]
        log("error", "WARNING", source="warnings", kind=category.__name__, where=where)

    sys.excepthook = lambda kind, error, traceback: unhandled(error, "main thread")
    threading.excepthook = lambda failed: unhandled(failed.exc_value, failed.thread.name if failed.thread else "thread")
    sys.unraisablehook = lambda failed: unhandled(failed.exc_value, "unraisable")
    warnings.showwarning = warning
