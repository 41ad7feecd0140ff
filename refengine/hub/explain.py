"""Messages for errors of the hub's library and of the network, without tokens and signed URLs."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Iterator

from refengine.errors import one_line
from refengine.hub.names import Reference

_NETWORK_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def without_secrets(text: str) -> str:
    """`text` without the user's token and without the query strings of URLs, which may have signatures."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "…")
    return re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1?…", text)


def endpoint() -> str:
    """The URL of the hub, without a user name or password."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def unreachable(error: Exception) -> str | None:
    """Why the hub cannot be reached now; None if the error is of another kind."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return f"it answers with HTTP status {status}" if status in (408, 429) or status >= 500 else None
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError) or libraries & _NETWORK_LIBRARIES:
        return one_line(str(_first_cause(error)))[:200] or type(error).__name__
    return None


def _first_cause(error: BaseException) -> BaseException:
    """The operating system's error that caused a library's error, if there is one; else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def no_space(figures: str) -> str:
    from huggingface_hub import constants

    return (
        f"too little disk space for {constants.HF_HUB_CACHE}: {figures}; delete files, or set HF_HOME to a folder on "
        "another disk"
    )


def explained(reference: Reference, error: Exception) -> str | None:
    """The message for an error of the library; None for an unexpected error."""
    from huggingface_hub import constants, errors, get_token

    has_token = get_token() is not None
    give_token = "with a token that may read it" if has_token else "with a token in HF_TOKEN (there is none)"
    why = unreachable(error)
    if why is not None:
        return f"the hub at {endpoint()} cannot be reached ({why})"
    if isinstance(error, errors.GatedRepoError):
        return f"this repo is gated: ask for access on its page, and try again {give_token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint()} has no such repo, or it is private: check the name, or try again {give_token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"this repo has no revision {reference.revision}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refuses the request (HTTP status {status}): try again {give_token}"
        return f"the hub refuses the request with HTTP status {status}"
    if isinstance(error, errors.FileMetadataError):
        return f"the server at {endpoint()} is not a hub"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space("it is full")
    if isinstance(error, OSError) and error.errno is not None:
        return f"the cache {constants.HF_HUB_CACHE} cannot be used: {error.strerror} ({error.filename})"
    if isinstance(error, ValueError):  # an invalid name of a repo or file
        return one_line(str(error))[:300]
    return None


class _ToTell(logging.Handler):
    """Passes the library's warnings on to `tell`, each on one line and without signed URLs."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(one_line(re.sub(r" from https?://\S+:", ":", without_secrets(record.getMessage()))))


@contextlib.contextmanager
def log_of_library(tell: Callable[[str], None]) -> Iterator[None]:
    """While the context is active, the library's warnings go to `tell` and not to stderr."""
    from huggingface_hub.utils import logging as _  # noqa: F401  its import adds a handler that writes to stderr

    logger = logging.getLogger("huggingface_hub")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [_ToTell(tell)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
