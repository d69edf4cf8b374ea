"""Requests that were there when the engine died: each runs alone first, and those that died alone not at all.

Decides when a submission may go to the core. Knows neither sockets nor the core itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..deaths import Deaths, base_id
from ..errors import EngineFailed
from ..protocol import Submit

ARRIVAL_SECONDS = 2.0
"""How long all others wait for suspects to be resubmitted: doors find a new engine within a fraction of that."""
TRIAL_TOKENS = 2
"""Output tokens after which a suspect has passed the place where it was when the engine died: with lookahead, one step
more had begun."""


@dataclass(frozen=True)
class Waiting:
    """A submission of ``door`` that is not yet with the core."""

    door: bytes
    submit: Submit


class Probation:
    """Of one engine process. ``on_acquitted`` is called with what ``deaths`` are to be from then on."""

    def __init__(self, deaths: Deaths, on_acquitted: Callable[[Deaths], None]) -> None:
        self._deaths = deaths
        self._on_acquitted = on_acquitted
        self._expected = set(deaths.suspects)
        """Suspects that have not come back yet."""
        self._expected_until = time.monotonic() + ARRIVAL_SECONDS
        self._suspects: deque[Waiting] = deque()
        self._others: deque[Waiting] = deque()
        self._on_trial: str | None = None
        """Request id of the one that runs alone."""
        self._num_tokens = 0

    @property
    def is_active(self) -> bool:
        """Whether anything is held back."""
        return self._on_trial is not None or bool(self._suspects) or self._is_waiting_for_suspects

    def check(self, submit: Submit) -> None:
        """Raise ``EngineFailed`` for a request that has died alone."""
        count = self._deaths.condemned.get(base_id(submit.request_id))
        if count is not None:
            raise EngineFailed(
                f"the engine broke {count} times while it served this request, the last time nothing else; "
                "it is not tried again"
            )

    def hold(self, door: bytes, submit: Submit) -> bool:
        """Whether the submission has to wait; ``release`` then brings it back."""
        request = base_id(submit.request_id)
        if request in self._expected:
            self._expected.discard(request)
            self._suspects.append(Waiting(door, submit))
            return True
        if self.is_active:
            self._others.append(Waiting(door, submit))
            return True
        return False

    def release(self, *, core_has_work: bool) -> list[Waiting]:
        """What may go to the core now: one suspect, or all others once there is none left."""
        if self._on_trial is not None or core_has_work:
            return []
        if self._suspects:
            suspect = self._suspects.popleft()
            self._on_trial, self._num_tokens = suspect.submit.request_id, 0
            return [suspect]
        if self.is_active:
            return []
        released, self._others = list(self._others), deque()
        return released

    def saw(self, request_id: str, *, num_tokens: int) -> None:
        """The core has computed output tokens of a request."""
        if request_id == self._on_trial:
            self._num_tokens += num_tokens
            if self._num_tokens >= TRIAL_TOKENS:
                self._acquit()

    def ended(self, request_id: str) -> None:
        """A request has finished, or its door has given it up, wherever it was."""
        if request_id == self._on_trial:
            self._acquit()
        self._suspects = _without(self._suspects, request_id)
        self._others = _without(self._others, request_id)

    def forget_door(self, door: bytes) -> None:
        self._suspects = deque(item for item in self._suspects if item.door != door)
        self._others = deque(item for item in self._others if item.door != door)

    @property
    def _is_waiting_for_suspects(self) -> bool:
        if self._expected and time.monotonic() > self._expected_until:
            self._expected.clear()
        return bool(self._expected)

    def _acquit(self) -> None:
        assert self._on_trial is not None
        self._deaths = self._deaths.acquit(self._on_trial)
        self._on_trial = None
        self._on_acquitted(self._deaths)


def _without(waiting: Iterable[Waiting], request_id: str) -> deque[Waiting]:
    return deque(item for item in waiting if item.submit.request_id != request_id)
