"""Errors as OpenAI's API words them. Knows which status each error of trident_client has over HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from trident_client import BadRequest, NotFound, Overloaded, TimedOut, TridentError

_DEFAULT_WAIT = 1.0


class ApiError(Exception):
    """``status`` is the HTTP status; ``param`` the field of the request that is at fault, where one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> bytes:
        """``{"error": {...}}`` as JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def bad_value(param: str, message: str) -> ApiError:
    """A field with a value that is not allowed."""
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def unsupported(param: str, message: str) -> ApiError:
    """A feature of OpenAI's API that this server does not have."""
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported_parameter")


def unknown_model(name: str, known: list[str]) -> ApiError:
    message = f"The model {name[:200]!r} does not exist. Models: {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def from_trident(error: TridentError, renamed: Mapping[str, str]) -> ApiError:
    """What a client of the gateway is told. ``renamed``: names of the server's options as the request wrote them."""
    if isinstance(error, BadRequest):
        option, colon, rest = error.message.partition(":")
        if not colon or not option.replace("_", "").isalnum():
            return ApiError(400, error.message)
        return bad_value(renamed.get(option, option), rest.strip())
    if isinstance(error, NotFound):
        return ApiError(404, error.message, code="model_not_found")
    if isinstance(error, Overloaded):
        wait = max(1, math.ceil(error.retry_after or _DEFAULT_WAIT))
        if "queue" in error.message:
            return ApiError(429, error.message, kind="rate_limit_error", code="overloaded", retry_after=wait)
        return ApiError(503, error.message, kind="server_error", code="unavailable", retry_after=wait)
    if isinstance(error, TimedOut):
        return ApiError(504, error.message, kind="server_error", code="timeout")
    return ApiError(500, error.message, kind="server_error", code="engine_error")
