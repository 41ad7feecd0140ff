"""Errors that a client receives: a stable code, an HTTP status, a message, and the field at fault."""

from __future__ import annotations

from typing import Any

from refengine.cache.paged import OutOfBlocks
from refengine.errors import RefengineError, RequestError, one_line

STATUS = {
    "INVALID_REQUEST": 400,
    "UNAUTHORIZED": 401,
    "MODEL_LOAD_FAILED": 500,
    "INSUFFICIENT_VRAM": 503,
    "VRAM_OOM": 500,
    "CUDA_ERROR": 500,
    "INFERENCE_TIMEOUT": 504,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "QUEUE_FULL": 503,
    "SHUTTING_DOWN": 503,
}
RETRIABLE = {"VRAM_OOM", "CUDA_ERROR", "INFERENCE_TIMEOUT", "QUEUE_FULL", "SHUTTING_DOWN"}
RETRY_AFTER_S = 1  # the Retry-After header of a full queue and of a worker that is shutting down
MAX_MESSAGE = 400  # characters of a message that may quote what a client sent
MAX_FIELD = 60  # characters of a field's name, which may be any text that a client sent


class WorkerError(Exception):
    """The error of a request. Sent as an HTTP status and JSON before the stream starts, as an `error` event after that.

    status: given only if it differs from the code's usual HTTP status (409, 413).
    """

    def __init__(self, code: str, message: str, field: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = None if field is None else "".join(c if c.isprintable() else "?" for c in field[:MAX_FIELD])
        self.message = one_line(message)[:MAX_MESSAGE]
        self.status = STATUS[code] if status is None else status

    def body(self) -> dict[str, Any]:
        """The JSON body of an HTTP response."""
        return {"code": self.code, "message": self.message, "field": self.field}

    def event(self) -> dict[str, Any]:
        """The data of an `error` event."""
        return {"code": self.code, "message": self.message, "retriable": self.code in RETRIABLE}

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_S)} if self.code in ("QUEUE_FULL", "SHUTTING_DOWN") else {}


def to_worker_error(error: BaseException, on_gpu: bool = False) -> WorkerError:
    """The error to send to a client. Of an unexpected exception it gives only the type, not the message."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, OutOfBlocks):
        return WorkerError("VRAM_OOM", str(error))
    if isinstance(error, RequestError):
        return WorkerError("INVALID_REQUEST", str(error), error.field)
    if isinstance(error, MemoryError):  # CuPy's OutOfMemoryError is one
        return WorkerError("VRAM_OOM", "the device has too little memory for this step; ask for less, or retry later")
    if on_gpu and "CUDA" in type(error).__name__:
        return WorkerError("CUDA_ERROR", f"the device failed during a step ({type(error).__name__})")
    if isinstance(error, RefengineError):
        return WorkerError("INTERNAL", str(error))
    return WorkerError("INTERNAL", f"unexpected {type(error).__name__}; the worker's log says where it was raised")
