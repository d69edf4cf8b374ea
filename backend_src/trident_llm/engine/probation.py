"""Requests that were there when the engine died: each runs alone first, and those that died alone not at all.

Decides when a submission may go to the core. Knows neither sockets nor the core itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from ..deaths import Deaths, base_id
from ..errors import EngineFailed
from ..protocol import Delta, SampleStart, Submit

ARRIVAL_SECONDS = 2.0
"""How long all others wait for suspects to be resubmitted: doors find a new engine within a fraction of that."""
TRIAL_TOKENS = 8
"""Output tokens after which a suspect has passed the place where it was when the engine died: its door may lack the
last few that had been generated, and with lookahead one step more had begun."""


@dataclass(frozen=True)
class Waiting:
    """A submission of ``door`` that is not yet with the core."""

    door: bytes
    submit: Submit


class _Trial:
    """The one request that runs, and what it has generated."""

    def __init__(self, suspect: Waiting) -> None:
        self._suspect = suspect
        self.request_id = suspect.submit.request_id
        self.outputs = {sample.index: list(sample.output_ids) for sample in suspect.submit.samples}
        """Of the samples that have not finished."""
        self.num_tokens = 0

    def add(self, delta: Delta) -> None:
        self.num_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.outputs.pop(delta.sample_index, None)
        else:
            self.outputs[delta.sample_index] += delta.token_ids

    def rest(self) -> Waiting:
        """A submission that goes on from here."""
        samples = [SampleStart(index=index, output_ids=ids) for index, ids in self.outputs.items()]
        return Waiting(self._suspect.door, msgspec.structs.replace(self._suspect.submit, samples=samples))


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
        self._on_trial: _Trial | None = None

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
        if self._on_trial is None and self._suspects and not core_has_work:
            suspect = self._suspects.popleft()
            self._on_trial = _Trial(suspect)
            return [suspect]
        if self.is_active:
            return []
        released, self._others = list(self._others), deque()
        return released

    def saw(self, delta: Delta) -> bool:
        """The core has computed tokens. True when it must let go of their request, because others are to be tried:
        ``release`` brings it back as far as it has come."""
        trial = self._on_trial
        if trial is None or trial.request_id != delta.request_id:
            return False
        trial.add(delta)
        if trial.num_tokens < TRIAL_TOKENS:
            return False
        self._acquit()
        if not self._suspects or not trial.outputs:
            return False
        self._others.appendleft(trial.rest())
        return True

    def ended(self, request_id: str) -> None:
        """A request has finished, or its door has given it up, wherever it was."""
        if self._on_trial is not None and request_id == self._on_trial.request_id:
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
        self._deaths = self._deaths.acquit(self._on_trial.request_id)
        self._on_trial = None
        self._on_acquitted(self._deaths)


def _without(waiting: Iterable[Waiting], request_id: str) -> deque[Waiting]:
    return deque(item for item in waiting if item.submit.request_id != request_id)
