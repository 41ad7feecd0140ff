"""Errors a user can cause or act on.

Every message names what was given, what was expected and what to do. The command line prints the
message on one line and exits with code 2; anything that is not a `RefengineError` is a bug in refengine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class RefengineError(Exception):
    """Base of all errors that are about the user's file, arguments or machine."""


class MissingLibraryError(RefengineError):
    """A library that this part of refengine needs is not installed. The message names the extra that brings it."""

    def __init__(self, message: str, library: str) -> None:
        super().__init__(message)
        self.library = library


class GGUFError(RefengineError):
    """The file is not well-formed GGUF. The message names the offence and its byte offset."""


class ModelError(RefengineError):
    """The file is valid GGUF, but not a model this engine can run (architecture, keys, tensors, types)."""


class TokenizerError(RefengineError):
    """The vocabulary cannot be built, or text or ids do not fit it."""


class DeviceError(RefengineError):
    """The device that was asked for cannot serve. required, available: bytes, where it has too few."""

    def __init__(self, message: str, required: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.required, self.available = required, available


class HubError(RefengineError):
    """A model named by its repo cannot be had: no such name, no access, no network, no room."""


class RequestError(RefengineError):
    """An argument of a call is outside what is allowed. field: its name, where it is one of a request's fields."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class TraceError(RefengineError):
    """A traced tensor is unknown, has the wrong shape, or holds NaN or Inf."""


class DumpError(RefengineError):
    """A dump of another engine's tensors, or a map of its names, is malformed or incomplete."""


class KernelError(RefengineError):
    """A kernel does not compile, is called wrongly, or does what it must not."""


def install_hint(*extras: str) -> str:
    """How to install extras of this package, from a checkout or from a wheel: it is in no package index."""
    names = ",".join(extras)
    return (
        f"install it with pip install '.[{names}]' in a checkout of refengine "
        f"(or pip install 'FILE.whl[{names}]' with its wheel)"
    )


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports: a library that is missing raises MissingLibraryError, which names it and the extra to install."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "refengine":
            raise  # a fault of our own
        raise _missing(what, str(e.name), extra) from None
    except MissingLibraryError as e:  # of a part inside; the extra of the whole brings that as well
        raise _missing(what, e.library, extra) from None


def _missing(what: str, library: str, extra: str) -> MissingLibraryError:
    return MissingLibraryError(f"{what} needs {library}, which is not installed; {install_hint(extra)}", library)


def one_line(text: str) -> str:
    """`text`, parts of which may come from a file, on one line and without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
