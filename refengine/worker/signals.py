"""Signals that come before a worker listens for them: while its libraries are imported, which takes half a second."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from refengine.worker.telemetry.log import Log


@contextlib.contextmanager
def ending_on_signals(worker_id: str, model: str, device: str) -> Iterator[None]:
    """Inside, until the worker's own handlers are there, SIGTERM and SIGINT end the process as they end a start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        with contextlib.suppress(OSError), open(2, "w", closefd=False) as stderr:  # sys.stderr's may be amid a line
            Log(worker_id, model, device, stderr)("shutdown", reason="stopped while it started")
        os._exit(0)  # not an exception: whoever imports could catch it

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
