"""The errors a user can meet, and the status code each carries to clients.

Every error text that leaves the project starts with its code in brackets, because the server does not keep
codes on streams: ``[INVALID_ARG] max_tokens: ...``. Clients parse that prefix back with ``parse_error``.
"""

from __future__ import annotations

import re


class TridentError(Exception):
    """Base of all errors meant for users. ``code`` is the name of a ``TRITONSERVER_Error_Code``."""

    code = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


class BadRequest(TridentError):
    """The request names an option, value or model that is not allowed; sending it again cannot help."""

    code = "INVALID_ARG"


class NotFound(TridentError):
    """A named thing (model folder, adapter, revision) does not exist."""

    code = "NOT_FOUND"


class Overloaded(TridentError):
    """No room now: the queue is full, or the engine is starting. Retrying later can help."""

    code = "UNAVAILABLE"


class EngineFailed(TridentError):
    """The engine broke while it served a request."""

    code = "INTERNAL"


class LoadFailed(TridentError):
    """A model, its configuration or its weights could not be loaded."""

    code = "INTERNAL"


class Cancelled(TridentError):
    """The client gave the request up."""

    code = "CANCELLED"


def known_error(error: Exception, kind: type[TridentError], about: str = "") -> TridentError:
    """``error`` itself if it is meant for users, else one of ``kind`` that names it, after ``about``."""
    return error if isinstance(error, TridentError) else kind(f"{about}{type(error).__name__}: {error}")


_BY_CODE: dict[str, type[TridentError]] = {
    cls.code: cls for cls in (BadRequest, NotFound, Overloaded, EngineFailed, Cancelled)
}
_PREFIX = re.compile(r"\[([A-Z_]+)\] (.*)", re.DOTALL)


def parse_error(text: str) -> TridentError:
    """The error that ``str(error)`` came from; text without a known code becomes ``EngineFailed``."""
    match = _PREFIX.search(text)
    if match and match[1] in _BY_CODE:
        return _BY_CODE[match[1]](match[2])
    return EngineFailed(text)
