"""Errors that a user can cause or fix.

Every message says what was given, what was expected and what to do. The command line prints the
message on one line and exits with code 2; any other exception than a `RefengineError` is a bug in refengine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class RefengineError(Exception):
    """Base class of all errors about the user's file, arguments or machine."""


class MissingLibraryError(RefengineError):
    """A library that this part of refengine needs is not installed. The message names the extra that installs it."""

    def __init__(self, message: str, library: str) -> None:
        super().__init__(message)
        self.library = library


class GGUFError(RefengineError):
    """The file is not well-formed GGUF. The message has the problem and its byte offset."""


class ModelError(RefengineError):
    """The file is valid GGUF, but refengine cannot run its model (architecture, keys, tensors, types)."""


class TokenizerError(RefengineError):
    """The vocabulary cannot be built, or text or ids are invalid for it."""


class DeviceError(RefengineError):
    """The requested device cannot be used. required, available: bytes of memory, if it has too little."""

    def __init__(self, message: str, required: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.required, self.available = required, available


class HubError(RefengineError):
    """A model on the hub cannot be downloaded: wrong name, no access, no network, or no disk space."""


class RequestError(RefengineError):
    """An argument is not allowed. field: its name, if it is a field of a request."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TraceError(RefengineError):
    """A traced tensor is unknown, has the wrong shape, or holds NaN or Inf."""


class DumpError(RefengineError):
    """A dump of another engine's tensors, or a map of its names, is malformed or incomplete."""


class KernelError(RefengineError):
    """A kernel does not compile, is called with wrong arguments, or makes a forbidden access."""


def install_hint(*extras: str) -> str:
    """How to install extras of this package, from a checkout or a wheel. The package is not in a package index."""
    names = ",".join(extras)
    return (
        f"install it with pip install '.[{names}]' in a checkout of refengine "
        f"(or pip install 'FILE.whl[{names}]' with its wheel)"
    )


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """A context for imports. A missing library raises MissingLibraryError, which names it and the extra to install."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "refengine":
            raise  # a bug in refengine
        raise _missing(what, str(e.name), extra) from None
    except MissingLibraryError as e:  # from an inner import; the outer extra installs that library as well
        raise _missing(what, e.library, extra) from None


def _missing(what: str, library: str, extra: str) -> MissingLibraryError:
    return MissingLibraryError(f"{what} needs {library}, which is not installed; {install_hint(extra)}", library)


def one_line(text: str) -> str:
    """`text` on one line, with control characters escaped. Parts of it may come from an untrusted file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
