"""When to send a request again, and how long to wait before. Does not send anything itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .errors import BadRequest, Overloaded


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """At most ``retries`` further attempts after ``Overloaded``, before any output has arrived.

    The wait doubles from ``first_delay`` seconds and is cut at ``max_delay``; half of it is random, so that clients
    turned away together do not come back together. When the server names a longer wait, that wait counts; when it
    names one beyond ``max_delay``, the error is raised at once.
    """

    retries: int = 3
    first_delay: float = 0.25
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise BadRequest(f"retries: {self.retries!r} is not an integer of at least 0")
        if not 0 <= self.first_delay <= self.max_delay:
            raise BadRequest(f"first_delay: {self.first_delay!r} is not between 0 and max_delay ({self.max_delay!r})")

    def delay(self, attempt: int, error: Overloaded) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (from 0). Raises ``error`` when enough were made."""
        asked = error.retry_after or 0.0
        if attempt >= self.retries or asked > self.max_delay:
            raise error
        backoff = min(self.first_delay * 2**attempt, self.max_delay)
        return max(asked, backoff * random.uniform(0.5, 1.0))
