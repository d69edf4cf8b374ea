"""How many requests may wait for their first step: by their number, and by how long the last of them would wait.

Knows the scheduler's numbers; neither requests nor clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..config import EngineConfig
from ..errors import BadRequest, Overloaded
from .scheduler import Scheduler

_WEIGHT = 1 / 16
"""Of the newest running sequence that has ended, in the average time between two ends."""


class QueueLimit:
    """The settings ``max_queue_size`` and ``max_queue_wait``.

    A sequence that waits starts when one that runs ends. So the time between two ends, times the sequences that wait,
    is what a new one would wait. It is measured only while some wait: otherwise ends follow arrivals.
    """

    def __init__(
        self, config: Callable[[], EngineConfig], scheduler: Scheduler, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``config``: the settings as they are now."""
        self._config = config
        self._scheduler = scheduler
        self._clock = clock
        self._interval: float | None = None
        """Average seconds between two ends; None until sequences have ended while others waited."""
        self._since: float | None = None
        """From when on ends count for the next average; None while nothing waits."""
        self._num_finished = 0
        """Of the scheduler, up to ``_since``."""
        self._room = config().max_num_seqs
        """Sequences that run at once: fewer than ``max_num_seqs`` when the pool does not hold more."""

    @property
    def num_places(self) -> int:
        """Sequences that ``check`` would let pass; less than 0 after a limit has shrunk."""
        return min(self._places_by_number(), self._places_by_wait())

    def check(self, num_samples: int) -> None:
        """Raises ``Overloaded`` when a new request does not fit now, ``BadRequest`` when it never does."""
        config = self._config()
        most = config.max_queue_size + config.max_num_seqs
        if num_samples > most:
            raise BadRequest(f"n: {num_samples} is not allowed; at most max_queue_size + max_num_seqs ({most})")
        if num_samples > self._places_by_number():
            raise Overloaded(
                f"{self._scheduler.num_unstarted} requests are waiting (max_queue_size {config.max_queue_size}); "
                "retry after 2 s"
            )
        if num_samples > self._places_by_wait():
            seconds = self._scheduler.num_unstarted * (self._interval or 0.0)
            raise Overloaded(
                f"a new request would wait for about {seconds:.1f} s (max_queue_wait {config.max_queue_wait:g} s); "
                "retry after 2 s"
            )

    def scheduled(self) -> None:
        """Learn from what has happened until now. Call after each schedule."""
        if not self._config().max_queue_wait:
            return
        now = self._clock()
        num_ended = self._scheduler.num_finished - self._num_finished
        if self._since is not None and num_ended:
            mean = (now - self._since) / num_ended
            weight = 1 - (1 - _WEIGHT) ** num_ended
            self._interval = mean if self._interval is None else self._interval + weight * (mean - self._interval)
        # While the weights change, what waits does not wait for an end.
        some_wait = self._scheduler.num_unstarted > 0 and not self._scheduler.hold.is_active
        if num_ended or self._since is None or not some_wait:
            self._num_finished = self._scheduler.num_finished
            self._since = now if some_wait else None
        self._room = len(self._scheduler.running) if some_wait else self._config().max_num_seqs

    def _places_by_number(self) -> int:
        config = self._config()
        most = config.max_queue_size + config.max_num_seqs - len(self._scheduler.running)
        return max(most, 1) - self._scheduler.num_unstarted

    def _places_by_wait(self) -> int:
        limit = self._config().max_queue_wait
        running, waiting = len(self._scheduler.running), self._scheduler.num_unstarted
        # Alone, a request waits for nobody but its own samples.
        if not limit or self._interval is None or not (running or waiting):
            return self._places_by_number()
        return max(self._room - running, 0) + int(limit / max(self._interval, 1e-6)) - waiting
