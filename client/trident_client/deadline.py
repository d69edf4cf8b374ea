"""Deadline: the time one call may still take, over all of its attempts."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .errors import BadRequest, TimedOut


@dataclass(frozen=True)
class Deadline:
    """``at`` is a ``time.monotonic()`` value; None means no limit."""

    at: float | None

    @classmethod
    def after(cls, timeout: float | None) -> Deadline:
        """The deadline ``timeout`` seconds from now. Raises ``BadRequest``."""
        if timeout is None:
            return cls(None)
        if not isinstance(timeout, (int, float)) or not timeout > 0:
            raise BadRequest(f"timeout: {timeout!r} is not a number of seconds above 0")
        return cls(time.monotonic() + timeout)

    def remaining(self) -> float | None:
        """Seconds left, as gRPC takes them: never negative."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def left(self) -> float | None:
        """Seconds left, for a call that wants more than none; otherwise raises ``TimedOut``."""
        remaining = self.remaining()
        if remaining == 0.0:
            raise TimedOut("the server did not answer within the timeout")
        return remaining

    def cut(self, delay: float, problem: str = "the server had no room within the timeout") -> float:
        """``delay`` seconds when they fit; otherwise raises ``TimedOut``, for there is no use in waiting."""
        remaining = self.remaining()
        if remaining is not None and delay >= remaining:
            raise TimedOut(problem)
        return delay
