"""Words for what goes wrong with the hub: errors of the library and the network, without tokens or signed addresses."""

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
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "…")
    return re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1?…", text)


def endpoint() -> str:
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def unreachable(error: Exception) -> str | None:
    """Why the hub cannot be asked now; None where it answered, or where the error is another."""
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
    """The operating system's error that a library's error comes from, where it is one; else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def no_space(figures: str) -> str:
    from huggingface_hub import constants

    return f"no room in {constants.HF_HUB_CACHE}: {figures}; make room, or set HF_HOME to a folder on another disk"


def explained(reference: Reference, error: Exception) -> str | None:
    """Words for an error of the library; None for one that nobody expects."""
    from huggingface_hub import constants, errors, get_token

    has_token = get_token() is not None
    give_token = "with a token that may read it" if has_token else "with a token in HF_TOKEN (there is none)"
    why = unreachable(error)
    if why is not None:
        return f"the hub at {endpoint()} cannot be reached ({why})"
    if isinstance(error, errors.GatedRepoError):
        return f"this repo is gated: ask for access on its page, and come again {give_token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint()} has no such repo, or it is private: check the name, or come again {give_token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"this repo has no revision {reference.revision}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refuses this (HTTP status {status}): come again {give_token}"
        return f"the hub refuses this with HTTP status {status}"
    if isinstance(error, errors.FileMetadataError):
        return f"what answers at {endpoint()} is not a hub"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space("it is full")
    if isinstance(error, OSError) and error.errno is not None:
        return f"the cache {constants.HF_HUB_CACHE} cannot be used: {error.strerror} ({error.filename})"
    if isinstance(error, ValueError):  # a name of a repo or a file that is not allowed
        return one_line(str(error))[:300]
    return None


class _ToTell(logging.Handler):
    """What the library warns of, in one line, without the signatures of its URLs."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(one_line(re.sub(r" from https?://\S+:", ":", without_secrets(record.getMessage()))))


@contextlib.contextmanager
def log_of_library(tell: Callable[[str], None]) -> Iterator[None]:
    from huggingface_hub.utils import logging as _  # noqa: F401  its import adds a handler that writes to stderr

    logger = logging.getLogger("huggingface_hub")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [_ToTell(tell)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
