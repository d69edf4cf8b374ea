"""A door's socket to the engine, and the one thread that owns it: it connects whenever an engine is ready, moves
messages both ways, and notices when the engine ends.

Knows messages and processes; neither generations nor the server's API.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import msgspec
import zmq

from ..errors import Overloaded, TridentError, parse_error
from ..protocol import Hello, ToDoor, ToEngine
from ..run_directory import RunDirectory

logger = logging.getLogger(__name__)

STATUS_INTERVAL = 0.05
"""Seconds between two looks at the engine's status while there is no connection."""
HELLO_TIMEOUT = 2.0
"""Seconds after which a connection without an answer is made anew."""


class Peer(Protocol):
    """Whom a connection tells what happens; all calls come from its thread, the last one with its lock held."""

    def receive(self, message: ToDoor) -> None:
        """Something has come from the engine; ``Welcome`` first, which is to be answered by ``open``."""

    def stay_down(self, error: TridentError) -> None:
        """There is no engine, and none will come by itself."""

    def lose_connection(self) -> None:
        """What was sent to the engine and is unanswered is lost."""


class EngineConnection:
    """Connects to the engine of ``run_directory``, again and again."""

    def __init__(self, run_directory: RunDirectory, lock: threading.Lock, peer: Peer) -> None:
        """``lock``: held by the caller of ``open`` and ``send``."""
        self._run_directory = run_directory
        self._lock = lock
        self._peer = peer
        self._outgoing: deque[ToEngine] = deque()
        self._open = threading.Event()
        self._was_open = False
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)

    @property
    def is_open(self) -> bool:
        """Whether the engine answers now."""
        return self._open.is_set()

    def wait_until_open(self, seconds: float) -> bool:
        return self._open.wait(seconds)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Send what is queued, and close the socket."""
        self._closing = True
        self._signal()
        self._thread.join()
        os.close(self._wake)

    def open(self, messages: Iterable[ToEngine]) -> None:
        """``messages`` go out before all that is sent from now on."""
        self._outgoing.extend(messages)
        self._was_open = True
        self._open.set()

    def send(self, message: ToEngine) -> None:
        """Queue ``message`` for the socket's thread. Without a connection it is dropped."""
        if self._open.is_set():
            self._outgoing.append(message)
            self._signal()

    def _signal(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        context = zmq.Context()
        try:
            while not self._closing:
                self._look_around(context)
                if not self._closing:
                    time.sleep(STATUS_INTERVAL)
        finally:
            context.destroy(linger=500)

    def _look_around(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Without a connection: make one if the engine is ready, say so if it stays down."""
        status = self._run_directory.read_status()
        if status is not None and status.state == "ready":
            try:
                self._serve(context, status.pid)
            except Exception:
                logger.exception("the connection to the engine broke; making a new one")
        elif status is not None and self._run_directory.is_final(status):
            self._peer.stay_down(parse_error(status.error))
        elif self._was_open and not self._run_directory.exists():
            self._peer.stay_down(Overloaded("the model that owns the engine is not loaded; retry after 2 s"))

    def _serve(self, context: zmq.Context[zmq.Socket[bytes]], pid: int) -> None:
        """Talk to the engine process ``pid`` until it ends or this end closes."""
        try:
            engine = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        socket = context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(self._run_directory.address)
            self._exchange(socket, engine)
        finally:
            with self._lock:
                self._open.clear()
                self._outgoing.clear()
                self._peer.lose_connection()
            socket.close(linger=500)
            os.close(engine)

    def _exchange(self, socket: zmq.Socket[bytes], engine: int) -> None:
        """Move messages both ways. ``engine``: a descriptor that becomes readable when the engine ends."""
        poller = zmq.Poller()
        for item in (socket, self._wake, engine):
            poller.register(item, zmq.POLLIN)
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToDoor)
        socket.send(encoder.encode(Hello(door=f"{os.getpid()}")))
        hello_deadline = time.monotonic() + HELLO_TIMEOUT
        while True:
            ready = dict(poller.poll(1000))
            closing = self._closing
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while socket.poll(0):
                self._peer.receive(decoder.decode(socket.recv()))
            while self._outgoing:
                socket.send(encoder.encode(self._outgoing.popleft()))
            if engine in ready or closing:
                return
            if not self._open.is_set() and time.monotonic() > hello_deadline:
                return
