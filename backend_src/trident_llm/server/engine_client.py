"""A door's connection to the engine: submits generations, feeds them the engine's deltas, and carries every
unfinished one over to the next engine process when one dies.

One thread owns the socket. Knows messages and generations; nothing of the server's API.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ..config import EngineConfig
from ..errors import EngineFailed, NotFound, Overloaded, TridentError, parse_error
from ..generation import Generation
from ..protocol import Abort, Command, CommandReply, Hello, Shutdown, StepDeltas, ToDoor, ToEngine, Welcome
from ..run_directory import EngineStatus, Launch, RunDirectory
from ..step_board import read_num_places
from .engine_watch import EngineWatch, FileLock, wait_for_end
from .live_generations import LiveGenerations, Notify
from .request_events import RequestEvents

logger = logging.getLogger(__name__)

OWNER_WAIT = 20.0
"""Seconds a door waits for the model that owns the engine to appear in the server."""
SHUTDOWN_WAIT = 3.0
"""Seconds the engine gets to end when asked, before it is killed."""
STATUS_INTERVAL = 0.05
"""Seconds between two looks at the engine's status while there is no connection."""
HELLO_TIMEOUT = 2.0
"""Seconds after which a connection without an answer is made anew."""


class EngineClient:
    """Connects one door to the engine of ``run_directory``.

    ``lock`` guards every generation that was submitted: hold it for ``take``, ``full_output`` and ``finished``,
    never while sending a response.
    """

    def __init__(
        self, run_directory: RunDirectory, *, launch: Launch | None, owner_pid: int, log: Callable[[str], None]
    ) -> None:
        """``launch``: how to start the engine, when this door's model owns it; None: another model does."""
        self.lock = threading.Lock()
        self.welcome: Welcome | None = None
        self._run_directory = run_directory
        self._launch = launch
        self._created_at = time.time()
        self._watch = EngineWatch(
            run_directory, owner_pid=owner_pid, forget_deaths=launch is not None, log=log
        )
        self._owners_lock = FileLock(run_directory.owners_lock_path)
        self.events = RequestEvents()
        self._live = LiveGenerations(self.events)
        self._outgoing: deque[ToEngine] = deque()
        self._commands: dict[int, Future[dict[str, Any]]] = {}
        self._command_ids = itertools.count(1)
        self._connected = threading.Event()
        self._failure = ""
        """Text of the error that every request gets while the engine stays down."""
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether the engine answers now."""
        return self._connected.is_set()

    @property
    def is_watch_holder(self) -> bool:
        """True in one door per engine: the one that restarts it and publishes its metrics."""
        return self._watch.is_holder

    @property
    def num_restarts(self) -> int:
        return self._watch.num_restarts

    @property
    def doors_folder(self) -> Path:
        """Where the boards of all doors to this engine are."""
        return self._run_directory.doors_path

    def start(self) -> Welcome:
        """Start the engine if this door's model owns it, and wait until it is ready.

        Raises the engine's own error when it cannot be loaded, ``NotFound`` when no model owns the engine, and
        ``EngineFailed`` when it runs with other settings.
        """
        if self._launch is not None:
            self._claim(self._launch)
        self._watch.start()
        self._thread.start()
        try:
            self._wait_until_connected()
        except TridentError:
            self._watch.stop()
            self._stop_thread()
            self._owners_lock.release()
            raise
        assert self.welcome is not None
        return self.welcome

    def submit(self, generation: Generation, notify: Notify) -> None:
        """Send a fresh or suspended generation. ``notify`` is called from another thread when it has new output.

        While the engine is being restarted the generation waits. Raises ``Overloaded`` when the queue is full or the
        engine stays down.
        """
        with self.lock:
            if self._failure:
                raise parse_error(self._failure)
            if not generation.was_submitted:
                self.check_room(len(generation.samples))
            self._send(self._live.add(generation, notify))

    def check_room(self, num_samples: int = 1) -> None:
        """Raise ``Overloaded`` for a new request that the engine would refuse, without waiting for its step to end.

        Doors ask before they read a request, too: refusing must cost less than serving.
        """
        if self.welcome is None or not self._connected.is_set():
            return
        places = read_num_places(self._run_directory.board_path)
        if places is not None and num_samples > places:
            limits = f"max_queue_size {self.welcome.max_queue_size}"
            if self.welcome.max_queue_wait:
                limits += f", max_queue_wait {self.welcome.max_queue_wait:g} s"
            raise Overloaded(f"the queue is full ({limits}); retry after 2 s")

    def suspend(self, generation: Generation) -> None:
        """Free what ``generation`` holds in the engine; ``submit`` continues it where it stands."""
        with self.lock:
            if self._live.remove(generation):
                self._send(Abort(request_id=generation.request_id))

    def cancel(self, generation: Generation) -> None:
        """End ``generation`` with finish_reason "cancelled" and free what it holds in the engine."""
        with self.lock:
            for abort in self._live.cancel(generation):
                self._send(abort)

    def command(self, name: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
        """Run an administrative command in the engine. Raises ``Overloaded`` when it does not answer in time."""
        command_id = next(self._command_ids)
        reply: Future[dict[str, Any]] = Future()
        with self.lock:
            if self._failure:
                raise parse_error(self._failure)
            if not self._connected.is_set():
                raise Overloaded("the engine is being started; retry after 2 s")
            self._commands[command_id] = reply
            self._send(Command(command_id=command_id, command=name, arguments=arguments))
        try:
            return reply.result(timeout)
        except FutureTimeout:
            raise Overloaded(f"the engine did not answer the command {name!r} within {timeout:g} s") from None
        finally:
            self._commands.pop(command_id, None)

    def close(self) -> None:
        """Cancel what is live; when this is the last door of the model that owns the engine, end the engine."""
        with self.lock:
            for abort in self._live.cancel_all():
                self._send(abort)
        self._watch.stop()
        is_last_owner = self._launch is not None and self._owners_lock.acquire()
        status = self._run_directory.read_status() if is_last_owner else None
        with self.lock:
            if is_last_owner:
                self._send(Shutdown(drain_timeout=self._drain_timeout))
        self._stop_thread()
        if status is not None:
            self._end_engine(status)
        self.events.close()
        self._owners_lock.release()

    @property
    def _drain_timeout(self) -> float:
        """Seconds that requests of other doors may take to finish when the engine is ended."""
        return 0.0 if self._launch is None else EngineConfig.from_parameters(self._launch.parameters).drain_timeout

    def _stop_thread(self) -> None:
        self._closing = True
        self._signal()
        self._thread.join()
        os.close(self._wake)

    def _claim(self, launch: Launch) -> None:
        """Make the run directory, or join one that has the same settings."""
        self._run_directory.create()
        self._run_directory.remove_stale_siblings()
        self._owners_lock.acquire(shared=True)
        present = self._run_directory.read_launch()
        status = self._run_directory.read_status()
        runs = status is not None and not wait_for_end(status.pid, 0)
        if runs and present is not None and present != launch:
            self._owners_lock.release()
            raise EngineFailed("the engine still runs with other settings; unload the model first, then load it")
        if present != launch:
            self._run_directory.forget_requantized()
            self._run_directory.write_launch(launch)

    def _wait_until_connected(self) -> None:
        deadline = time.monotonic() + OWNER_WAIT
        while not self._connected.wait(STATUS_INTERVAL):
            status = self._run_directory.read_status()
            if status is not None and self._run_directory.is_final(status):
                if self._launch is None or status.written_at >= self._created_at:
                    raise parse_error(status.error)
            elif status is not None or self._launch is not None:
                continue
            elif time.monotonic() > deadline:
                raise NotFound(f"no model of this server owns the engine; waited {OWNER_WAIT:.0f} s for one to load")

    def _end_engine(self, status: EngineStatus) -> None:
        """Wait for the engine to follow ``Shutdown``; kill it when it does not."""
        if self._run_directory.is_final(status):
            self._run_directory.remove()
        elif not wait_for_end(status.pid, self._drain_timeout + SHUTDOWN_WAIT if self.welcome is not None else 0):
            self._run_directory.remove()
            os.kill(status.pid, 9)
            wait_for_end(status.pid, SHUTDOWN_WAIT)
        self._watch.reap()

    def _send(self, message: ToEngine) -> None:
        """Queue ``message`` for the socket's thread. Without a connection it is dropped."""
        if self._connected.is_set():
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
        """Without a connection: make one if the engine is ready, fail everything if it stays down."""
        status = self._run_directory.read_status()
        if status is not None and status.state == "ready":
            try:
                self._serve_connection(context, status.pid)
            except Exception:
                logger.exception("the connection to the engine broke; making a new one")
        elif status is not None and self._run_directory.is_final(status):
            self._fail_all(parse_error(status.error))
        elif self.welcome is not None and not self._run_directory.exists():
            self._fail_all(Overloaded("the model that owns the engine is not loaded; retry after 2 s"))

    def _serve_connection(self, context: zmq.Context[zmq.Socket[bytes]], pid: int) -> None:
        """Talk to the engine process ``pid`` until it ends or the client closes."""
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
            with self.lock:
                self._connected.clear()
                self._outgoing.clear()
                for reply in self._commands.values():
                    reply.set_exception(Overloaded("the engine ended; it is being started again, retry after 2 s"))
                self._commands.clear()
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
                self._receive(decoder.decode(socket.recv()))
            while self._outgoing:
                socket.send(encoder.encode(self._outgoing.popleft()))
            if engine in ready or closing:
                return
            if not self._connected.is_set() and time.monotonic() > hello_deadline:
                return

    def _receive(self, message: ToDoor) -> None:
        if isinstance(message, StepDeltas):
            self._apply(message)
        elif isinstance(message, CommandReply):
            reply = self._commands.pop(message.command_id, None)
            if reply is not None and message.error:
                reply.set_exception(parse_error(message.error))
            elif reply is not None:
                reply.set_result(message.result)
        else:
            self._resubmit(message)

    def _apply(self, message: StepDeltas) -> None:
        with self.lock:
            if self.welcome is None or message.epoch != self.welcome.epoch:
                return
            applied = self._live.apply(message.deltas)
            self._outgoing.extend(applied.messages)
        for notify in applied.notify:
            notify()

    def _resubmit(self, welcome: Welcome) -> None:
        """Begin with a new engine process: it knows none of the live generations."""
        with self.lock:
            self.events.attach(self.doors_folder)
            self.welcome = welcome
            self._failure = ""
            self._outgoing.extend(self._live.resubmit())
            self._connected.set()

    def _fail_all(self, error: TridentError) -> None:
        with self.lock:
            self._failure = str(error)
            failed = self._live.fail_all(error)
        for notify in failed:
            notify()
