"""Handles signals that arrive while the worker's libraries are imported, which takes half a second."""

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
    """While the context is active, SIGTERM and SIGINT log a shutdown and end the process with exit code 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        with contextlib.suppress(OSError), open(2, "w", closefd=False) as stderr:  # sys.stderr may be in mid-write
            Log(worker_id, model, device, stderr)("shutdown", reason="stopped during the start")
        os._exit(0)  # an exception could be caught by the code that is being imported

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
