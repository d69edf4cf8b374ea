"""The iterative door: the Triton server hands over all live sequences of this instance again and again, and each
execute answers those that have new text. It never runs the model, and holds no lock while it sends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from ..errors import BadRequest
from .delivery import Delivery, Reply
from .engine_client import EngineClient
from .request import RequestReader
from .responses import FINAL, ResponseBuilder, error_response

logger = logging.getLogger(__name__)

MIN_WAIT, MAX_WAIT = 0.010, 0.050
"""Bounds of the longest wait of one execute for output, in seconds: a new request waits as long to be seen."""
ARRIVAL_WAIT = 0.002
"""The same for an execute that ends a pause: requests that came with its own may be right behind."""
SUSPEND_AFTER = 0.4
"""Seconds without an execute that carries a sequence, after which its engine resources are freed: the server does
not say when a request is cancelled, it just never comes back."""
FORGET_AFTER = 5.0
"""Seconds after which a suspended sequence is given up; one that comes back earlier goes on where it stood."""
WATCH_INTERVAL = 0.1


@dataclass
class _Sequence:
    """One live request of this instance, by its correlation id."""

    delivery: Delivery
    carried_at: float
    """When an execute last carried it, on the monotonic clock."""
    suspended: bool = False


@dataclass(frozen=True)
class _Carried:
    """A sequence and the request object that carries it in this execute."""

    correlation_id: int
    sequence: _Sequence
    request: Any
    has_begun: bool
    """Whether this execute submitted it to the engine."""


class _OutputSignal:
    """Tells a waiting execute that there is output.

    It waits at most a quarter of the usual time between two outputs, pauses apart: a new request is then seen well
    before the engine's next step, and an engine with slow steps is not robbed of the processor by executes without
    output.
    """

    def __init__(self) -> None:
        self._no_output = threading.Lock()
        """Held while there is none. Waking by a lock takes half as long as by an event."""
        self._no_output.acquire()
        self._interval = 4 * MIN_WAIT
        self._since = time.monotonic()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._no_output.release()

    def wait(self, *, after_pause: bool) -> None:
        """``after_pause``: all requests of this execute begin with it."""
        limit = ARRIVAL_WAIT if after_pause else min(max(self._interval / 4, MIN_WAIT), MAX_WAIT)
        if after_pause:
            self._since = time.monotonic()
        if self._no_output.acquire(timeout=limit):
            now = time.monotonic()
            self._interval += 0.2 * (min(now - self._since, 4 * MAX_WAIT) - self._interval)
            self._since = now


class IterativeDoor:
    """``execute`` of a model with iterative sequence batching, strategy direct."""

    def __init__(self, client: EngineClient, reader: RequestReader) -> None:
        self._client = client
        self._reader = reader
        self._responses = ResponseBuilder(batched=True)
        self._sequences: dict[int, _Sequence] = {}
        self._sequences_lock = threading.Lock()
        self._executing = False
        self._output = _OutputSignal()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sequence-watch", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that have not had their last response."""
        return len(self._sequences)

    def execute(self, requests: list[Any]) -> None:
        self._executing = True
        try:
            self._execute(requests)
        finally:
            self._executing = False

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _execute(self, requests: list[Any]) -> None:
        # Strategy direct fills empty slots with null requests, whose correlation id is 0.
        carried = [item for request in requests if request.correlation_id() and (item := self._admit(request))]
        if not carried:
            return
        self._output.wait(after_pause=all(item.has_begun for item in carried))
        now = time.monotonic()
        with self._client.lock:
            replies = [item.sequence.delivery.collect(now) for item in carried]
            overdue = [item for item in carried if item.sequence.delivery.is_overdue(now)]
        for item in overdue:
            self._client.cancel(item.sequence.delivery.generation)
            self._output.set()
        for item, reply in zip(carried, replies, strict=True):
            try:
                self._answer(item, reply)
            except Exception:
                logger.exception("a response could not be sent; its request is given up")
                self._drop(item)
        sent_at = time.monotonic()
        for item in carried:
            item.sequence.carried_at = sent_at

    def _admit(self, request: Any) -> _Carried | None:
        """The sequence of ``request``, begun here if it is new; None when the request got an error instead."""
        correlation_id = request.correlation_id()
        starts = bool(request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START)
        try:
            with self._sequences_lock:
                sequence = self._sequences.get(correlation_id)
                if sequence is not None and starts:
                    raise BadRequest("sequence_id: already in use; leave the sequence fields out")
                if sequence is not None and not sequence.suspended:
                    return _Carried(correlation_id, sequence, request, has_begun=False)
            if sequence is None and not starts:
                raise BadRequest("sequence_start: missing; leave the sequence fields out")
            if sequence is None:
                self._client.check_room()
                sequence = _Sequence(Delivery(self._reader.read(request)), time.monotonic())
            self._begin(correlation_id, sequence)
            return _Carried(correlation_id, sequence, request, has_begun=True)
        except Exception as error:
            self._client.events.refused(error, request.request_id())
            request.get_response_sender().send(error_response(error), flags=FINAL)
            return None

    def _begin(self, correlation_id: int, sequence: _Sequence) -> None:
        """Submit a new sequence, or one that was suspended."""
        delivery = sequence.delivery
        sequence.carried_at = time.monotonic()
        sequence.suspended = False
        if not delivery.generation.finished:
            self._client.submit(delivery.generation, functools.partial(self._notify, delivery))
        with self._sequences_lock:
            self._sequences[correlation_id] = sequence

    def _notify(self, delivery: Delivery) -> None:
        if delivery.has_news:
            self._output.set()

    def _answer(self, item: _Carried, reply: Reply | None) -> None:
        """Send ``reply`` if there is one, and have the request come again unless that was its last."""
        if reply is not None:
            sender = item.request.get_response_sender()
            response = self._responses.build(item.sequence.delivery.generation, reply)
            self._client.events.responded()
            if reply.is_final:
                with self._sequences_lock:
                    self._sequences.pop(item.correlation_id, None)
                sender.send(response, flags=FINAL)
                return
            sender.send(response)
        item.request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)

    def _drop(self, item: _Carried) -> None:
        with self._sequences_lock:
            self._sequences.pop(item.correlation_id, None)
        self._client.cancel(item.sequence.delivery.generation)

    def _watch(self) -> None:
        """Free what sequences hold that no execute carries any more."""
        while not self._closing.wait(WATCH_INTERVAL):
            if self._executing:
                continue
            now = time.monotonic()
            with self._sequences_lock:
                sequences = list(self._sequences.items())
            for correlation_id, sequence in sequences:
                missing = now - sequence.carried_at
                if missing > FORGET_AFTER:
                    with self._sequences_lock:
                        self._sequences.pop(correlation_id, None)
                    self._client.cancel(sequence.delivery.generation)
                elif missing > SUSPEND_AFTER and not sequence.suspended:
                    sequence.suspended = True
                    self._client.suspend(sequence.delivery.generation)
