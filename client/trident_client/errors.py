"""The errors a client can meet. Knows how the server writes codes into its texts, and which gRPC status means what."""

from __future__ import annotations

import re

import grpc


class TridentError(Exception):
    """Base of all errors of this package. ``code`` is the server's name for the kind of error."""

    code = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


class BadRequest(TridentError):
    """An option or value that is not allowed; sending the request again cannot help."""

    code = "INVALID_ARG"


class NotFound(TridentError):
    """The model, the adapter or whatever the request names does not exist."""

    code = "NOT_FOUND"


class Overloaded(TridentError):
    """The server has no room now, is still starting, or cannot be reached. Trying later can help."""

    code = "UNAVAILABLE"

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asked to wait, or None."""
        match = _RETRY_AFTER.search(self.message)
        return float(match[1]) if match else None


class EngineFailed(TridentError):
    """The server broke while it served the request."""

    code = "INTERNAL"


class Cancelled(TridentError):
    """The request was given up, by the server or by closing the client."""

    code = "CANCELLED"


class TimedOut(TridentError):
    """The answer was not complete within the call's ``timeout``."""

    code = "DEADLINE_EXCEEDED"


_BY_CODE: dict[str, type[TridentError]] = {
    cls.code: cls for cls in (BadRequest, NotFound, Overloaded, EngineFailed, Cancelled)
}
_BY_STATUS: dict[grpc.StatusCode, type[TridentError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAVAILABLE: Overloaded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
}
_PREFIX = re.compile(r"\[([A-Z_]+)\] (.*)", re.DOTALL)
_RETRY_AFTER = re.compile(r"retry after (\d+(?:\.\d+)?) s")
_UNKNOWN_MODEL = "Request for unknown model"


def parse_error(text: str, status: grpc.StatusCode | None = None) -> TridentError:
    """The error behind a text of the server, ``[CODE] message``.

    A text without a known code comes from the Triton server itself: then ``status`` tells, where there is one
    (a stream has none, so its one common case, an unknown model, is known by its words).
    """
    match = _PREFIX.search(text)
    if match and match[1] in _BY_CODE:
        return _BY_CODE[match[1]](match[2])
    if status in _BY_STATUS:
        return _BY_STATUS[status](text)
    return NotFound(text) if text.startswith(_UNKNOWN_MODEL) else EngineFailed(text)


def from_rpc(error: grpc.RpcError, url: str) -> TridentError:
    """The error behind a failed call to the server at ``url``."""
    text, status = error.details() or "no details", error.code()
    if status == grpc.StatusCode.UNAVAILABLE and not _PREFIX.search(text):
        return Overloaded(f"no connection to the server at {url}: {text}")
    if status == grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"the server at {url} did not finish within the timeout")
    return parse_error(text, status)
