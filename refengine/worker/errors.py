"""What can go wrong for a client: a stable code, its HTTP status, words, and the field that is to blame."""

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
RETRY_AFTER_S = 1  # where a full queue or a worker that stops sends a client away
MAX_MESSAGE = 400  # characters of a message that may quote what a client sent
MAX_FIELD = 60  # characters of a field's name, which a client may have made up


class WorkerError(Exception):
    """Answers a request: as an HTTP status and JSON before its stream starts, as the event `error` after.

    status: only where it is not the code's own (409, 413).
    """

    def __init__(self, code: str, message: str, field: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = None if field is None else "".join(c if c.isprintable() else "?" for c in field[:MAX_FIELD])
        self.message = one_line(message)[:MAX_MESSAGE]
        self.status = STATUS[code] if status is None else status

    def body(self) -> dict[str, Any]:
        """The JSON of an HTTP answer."""
        return {"code": self.code, "message": self.message, "field": self.field}

    def event(self) -> dict[str, Any]:
        """The data of an `error` event."""
        return {"code": self.code, "message": self.message, "retriable": self.code in RETRIABLE}

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_S)} if self.code in ("QUEUE_FULL", "SHUTTING_DOWN") else {}


def to_worker_error(error: BaseException, on_gpu: bool = False) -> WorkerError:
    """What a client is told of an error of the engine's. Nothing of an unexpected error but its kind."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, OutOfBlocks):
        return WorkerError("VRAM_OOM", str(error))
    if isinstance(error, RequestError):
        return WorkerError("INVALID_REQUEST", str(error), error.field)
    if isinstance(error, MemoryError):  # CuPy's OutOfMemoryError is one
        return WorkerError("VRAM_OOM", "the device has too little memory for this step; ask for less, or later")
    if on_gpu and "CUDA" in type(error).__name__:
        return WorkerError("CUDA_ERROR", f"the device failed in the middle of a step ({type(error).__name__})")
    if isinstance(error, RefengineError):
        return WorkerError("INTERNAL", str(error))
    return WorkerError("INTERNAL", f"unexpected {type(error).__name__}; the log of the worker has where")
