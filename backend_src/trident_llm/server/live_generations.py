"""The unfinished generations of one door: fed with deltas, carried over from one engine process to the next.

Not thread-safe; knows no sockets. What it returns is for the caller to send, or to tell once its lock is free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import EngineFailed, TridentError
from ..generation import Generation
from ..protocol import Abort, Delta, Submit
from .request_events import RequestEvents

logger = logging.getLogger(__name__)

Notify = Callable[[], None]
"""Called when a generation may have new output."""


@dataclass
class _Live:
    generation: Generation
    notify: Notify


@dataclass(frozen=True)
class Applied:
    """What follows from a batch of deltas, or from an error."""

    messages: list[Submit | Abort]
    """For the engine."""
    notify: list[Notify]

    def tell(self) -> None:
        """Call all of ``notify``; not with the lock held that guards the generations."""
        for notify in self.notify:
            notify()


class LiveGenerations:
    """Keyed by the request id of each generation's latest submission."""

    def __init__(self, events: RequestEvents) -> None:
        """``events`` hears of every submission, and of every end."""
        self._events = events
        self._live: dict[str, _Live] = {}

    def __len__(self) -> int:
        return len(self._live)

    def add(self, generation: Generation, notify: Notify) -> Submit:
        return self._register(_Live(generation, notify))

    def remove(self, generation: Generation) -> bool:
        """Forget ``generation``; whether it was there."""
        return self._live.pop(generation.request_id, None) is not None

    def apply(self, deltas: Iterable[Delta]) -> Applied:
        """Feed each delta to its generation; those of unknown requests are dropped."""
        messages: list[Submit | Abort] = []
        touched: dict[str, _Live] = {}
        for delta in deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                continue
            touched[delta.request_id] = live
            messages += self._feed(live, delta)
            if live.generation.finished:
                del self._live[delta.request_id]
                self._events.ended(live.generation)
            elif live.generation.needs_resubmit:
                del self._live[delta.request_id]
                messages.append(self._register(live))
        return Applied(messages, [live.notify for live in touched.values()])

    def resubmit(self) -> list[Submit]:
        """Messages that continue every generation in an engine that knows none of them."""
        lives, self._live = list(self._live.values()), {}
        return [self._register(live) for live in lives]

    def fail_all(self, error: TridentError) -> Applied:
        lives, self._live = list(self._live.values()), {}
        messages: list[Submit | Abort] = []
        for live in lives:
            messages += live.generation.fail(error)
            self._events.ended(live.generation)
        return Applied(messages, [live.notify for live in lives])

    def cancel_all(self) -> list[Abort]:
        lives, self._live = list(self._live.values()), {}
        return [abort for live in lives for abort in self._cancel(live.generation)]

    def cancel(self, generation: Generation) -> list[Abort]:
        """End ``generation``, which may be live or suspended."""
        self.remove(generation)
        return self._cancel(generation)

    def _cancel(self, generation: Generation) -> list[Abort]:
        aborts = generation.cancel()
        self._events.ended(generation)
        return aborts

    def _register(self, live: _Live) -> Submit:
        self._events.submitted(live.generation)
        submit = live.generation.submit()
        self._live[submit.request_id] = live
        return submit

    def _feed(self, live: _Live, delta: Delta) -> list[Abort]:
        try:
            return live.generation.apply(delta)
        except Exception:
            logger.exception("request %s: its output could not be turned into text", delta.request_id)
            return live.generation.fail(EngineFailed("the output of this request could not be turned into text"))
