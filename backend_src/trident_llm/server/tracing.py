"""What a request that is part of a trace went through, and whether spans can be made of it.

Knows neither generations nor OpenTelemetry, which is an optional extra.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LoadFailed

TRACE_HEADERS = ("traceparent", "tracestate")
"""Of the W3C's recommendation on trace context."""


@dataclass(frozen=True)
class RequestTrace:
    """One request. Times are of the monotonic clock; 0 for what it did not reach."""

    context: Mapping[str, str]
    """``TRACE_HEADERS`` as they came."""
    requested_at: float
    started_at: float
    first_token_at: float
    ended_at: float
    attributes: Mapping[str, str | int | tuple[str, ...]]
    error: str = ""

    def phases(self) -> list[tuple[str, float, float]]:
        """Name, begin and end of each phase that was begun."""
        begins = [("queue", self.requested_at), ("prefill", self.started_at), ("decode", self.first_token_at)]
        reached = [(name, begin) for name, begin in begins if begin]
        ends = [*(begin for _, begin in reached[1:]), self.ended_at]
        return [(name, begin, end) for (name, begin), end in zip(reached, ends, strict=True)]


def check_tracing(otlp_endpoint: str) -> None:
    """Raise ``LoadFailed`` when spans are wanted and the packages that make them are missing."""
    if not otlp_endpoint:
        return
    try:
        importlib.import_module(".tracer", __package__)
    except ImportError as error:
        raise LoadFailed(
            f"otlp_endpoint: {otlp_endpoint!r} needs packages that are not installed ({error}); "
            "install them (pip install 'trident-llm[tracing]'), or leave the setting empty"
        ) from None
