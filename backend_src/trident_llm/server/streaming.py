"""The streaming door: requests come once, and a thread of its own sends their responses, each with all text since
the last. It never runs the model, and holds no lock while it sends.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from ..errors import Cancelled, TridentError
from .delivery import Delivery, Reply
from .engine_client import EngineClient, being_unloaded
from .request import RequestReader
from .responses import FINAL, ResponseBuilder, error_response

logger = logging.getLogger(__name__)

CHECK_INTERVAL = 0.1
"""Seconds between two looks at all streams for timeouts, silence and cancellation."""
CANCEL_CHECK_SECONDS = 0.4
"""Seconds between two questions to the server whether a request is cancelled; each is a round trip."""


@dataclass(eq=False)
class _Stream:
    """One request and where its responses go."""

    delivery: Delivery
    sender: Any
    checked_at: float
    queued: bool = False
    """Waits in the queue of the sending thread."""


class StreamingDoor:
    """``execute`` of a decoupled model without scheduling."""

    def __init__(self, client: EngineClient, reader: RequestReader) -> None:
        self._client = client
        self._reader = reader
        self._responses = ResponseBuilder(batched=False)
        self._streams: set[_Stream] = set()
        self._streams_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._send_all, name="response-sender", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that have not had their last response."""
        return len(self._streams)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._client.check_room()
                self._begin(_Stream(Delivery(self._reader.read(request)), sender, checked_at=time.monotonic()))
            except Exception as error:
                self._client.events.refused(error, request.request_id())
                sender.send(error_response(error), flags=FINAL)

    def close(self) -> None:
        """End every stream with a cancelled error, and stop sending."""
        with self._streams_lock:
            self._closing = True
        self._queue.put(None)
        self._thread.join()
        for stream in list(self._streams):
            self._give_up(stream)

    def _begin(self, stream: _Stream) -> None:
        with self._streams_lock:
            if self._closing:
                raise being_unloaded()
            self._streams.add(stream)
        try:
            self._client.submit(stream.delivery.generation, functools.partial(self._notify, stream))
        except TridentError:
            # Closing may have answered it.
            if self._forget(stream):
                raise

    def _notify(self, stream: _Stream) -> None:
        if stream.delivery.has_news and not stream.queued:
            stream.queued = True
            self._queue.put(stream)

    def _send_all(self) -> None:
        next_check = 0.0
        while not self._closing:
            try:
                stream = self._queue.get(timeout=CHECK_INTERVAL)
            except queue.Empty:
                stream = None
            if stream is not None:
                stream.queued = False
                self._deliver(stream)
            if time.monotonic() >= next_check:
                self._check_all()
                next_check = time.monotonic() + CHECK_INTERVAL

    def _deliver(self, stream: _Stream) -> None:
        try:
            with self._client.lock:
                reply = stream.delivery.collect(time.monotonic()) if stream in self._streams else None
            if reply is not None:
                self._send(stream, reply)
        except Exception:
            logger.exception("a response could not be sent; its request is given up")
            self._give_up(stream)

    def _send(self, stream: _Stream, reply: Reply) -> None:
        response = self._responses.build(stream.delivery.generation, reply)
        self._client.events.responded()
        if reply.is_final:
            self._forget(stream)
            stream.sender.send(response, flags=FINAL)
        else:
            stream.sender.send(response)

    def _check_all(self) -> None:
        with self._streams_lock:
            streams = list(self._streams)
        now = time.monotonic()
        for stream in streams:
            if stream.delivery.is_overdue(now):
                self._client.cancel(stream.delivery.generation)
            elif now - stream.checked_at > CANCEL_CHECK_SECONDS:
                stream.checked_at = now
                if stream.sender.is_cancelled():
                    self._give_up(stream)
                    continue
            self._deliver(stream)

    def _give_up(self, stream: _Stream) -> None:
        """Cancel in the engine, and end the request with an error that a client still listening can read."""
        self._client.cancel(stream.delivery.generation)
        if self._forget(stream):
            try:
                stream.sender.send(error_response(Cancelled("the request was cancelled")), flags=FINAL)
            except pb_utils.TritonModelException:
                logger.info("the last response of a cancelled request could not be sent")

    def _forget(self, stream: _Stream) -> bool:
        """Whether ``stream`` was still live: its final response is then for the caller to send."""
        with self._streams_lock:
            known = stream in self._streams
            self._streams.discard(stream)
        return known
