"""A door's connection to the engine: submits generations, feeds them the engine's deltas, and carries every
unfinished one over to the next engine process when one dies.

Knows messages and generations; nothing of sockets or of the server's API.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from ..errors import NotFound, Overloaded, TridentError, parse_error
from ..generation import Generation
from ..protocol import Abort, Command, CommandReply, Shutdown, StepDeltas, ToDoor, Welcome
from ..run_directory import Launch, RunDirectory
from ..step_board import read_num_places
from .engine_connection import STATUS_INTERVAL, EngineConnection
from .engine_ownership import EngineOwnership
from .engine_watch import EngineWatch
from .live_generations import Applied, LiveGenerations, Notify
from .request_events import RequestEvents

OWNER_WAIT = 20.0
"""Seconds a door waits for the model that owns the engine to appear in the server."""


def being_unloaded() -> Overloaded:
    """What requests get whose model is being unloaded."""
    return Overloaded("the model is being unloaded; retry after 2 s")


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
        self.run_directory = run_directory
        self._ownership = EngineOwnership(run_directory, launch)
        self._watch = EngineWatch(run_directory, owner_pid=owner_pid, log=log)
        self._connection = EngineConnection(run_directory, self.lock, self)
        self.events = RequestEvents()
        self._live = LiveGenerations(self.events)
        self._commands: dict[int, Future[dict[str, Any]]] = {}
        self._command_ids = itertools.count(1)
        self._failure = ""
        """Text of the error that every request gets while the engine stays down."""
        self._is_closed = False

    @property
    def ready(self) -> bool:
        """Whether the engine answers now."""
        return self._connection.is_open

    @property
    def is_watch_holder(self) -> bool:
        """True in one door per engine: the one that restarts it and publishes its metrics."""
        return self._watch.is_holder

    def before_watch_release(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called by another thread when this door is no watch holder any more and before any other
        is one."""
        self._watch.before_release = callback

    @property
    def num_restarts(self) -> int:
        return self._watch.num_restarts

    @property
    def doors_folder(self) -> Path:
        """Where the boards of all doors to this engine are."""
        return self.run_directory.doors_path

    @property
    def drain_timeout(self) -> float:
        """Seconds that running requests may take to finish when their model is unloaded."""
        return self._ownership.drain_timeout

    def start(self) -> Welcome:
        """Start the engine if this door's model owns it, and wait until it is ready.

        Raises the engine's own error when it cannot be loaded, ``NotFound`` when no model owns the engine, and
        ``EngineFailed`` when it runs with other settings.
        """
        self._ownership.claim()
        self._watch.start()
        self._connection.start()
        try:
            self._wait_until_connected()
        except TridentError:
            self._watch.stop()
            self._connection.stop()
            self._ownership.release()
            raise
        assert self.welcome is not None
        return self.welcome

    def submit(self, generation: Generation, notify: Notify) -> None:
        """Send a fresh or suspended generation. ``notify`` is called from another thread when it has new output.

        While the engine is being restarted the generation waits. Raises ``Overloaded`` when the queue is full, the
        engine stays down or the client is closed.
        """
        with self.lock:
            self._check_usable()
            if not generation.was_submitted:
                self.check_room(len(generation.samples))
            self._connection.send(self._live.add(generation, notify))

    def check_room(self, num_samples: int = 1) -> None:
        """Raise ``Overloaded`` for a new request that the engine would refuse, without waiting for its step to end.

        Doors ask before they read a request, too: refusing must cost less than serving.
        """
        if self.welcome is None or not self._connection.is_open:
            return
        places = read_num_places(self.run_directory.board_path)
        if places is not None and num_samples > places:
            limits = f"max_queue_size {self.welcome.max_queue_size}"
            if self.welcome.max_queue_wait:
                limits += f", max_queue_wait {self.welcome.max_queue_wait:g} s"
            raise Overloaded(f"the queue is full ({limits}); retry after 2 s")

    def suspend(self, generation: Generation) -> None:
        """Free what ``generation`` holds in the engine; ``submit`` continues it where it stands."""
        with self.lock:
            if self._live.remove(generation):
                self._connection.send(Abort(request_id=generation.request_id))

    def cancel(self, generation: Generation) -> None:
        """End ``generation`` with finish_reason "cancelled" and free what it holds in the engine."""
        with self.lock:
            for abort in self._live.cancel(generation):
                self._connection.send(abort)

    def command(self, name: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
        """Run an administrative command in the engine. Raises ``Overloaded`` when it does not answer in time."""
        command_id = next(self._command_ids)
        reply: Future[dict[str, Any]] = Future()
        with self.lock:
            self._check_usable()
            if not self._connection.is_open:
                raise Overloaded("the engine is being started; retry after 2 s")
            self._commands[command_id] = reply
            self._connection.send(Command(command_id=command_id, command=name, arguments=arguments))
        try:
            return reply.result(timeout)
        except FutureTimeout:
            raise Overloaded(f"the engine did not answer the command {name!r} within {timeout:g} s") from None
        finally:
            self._commands.pop(command_id, None)

    def end_all(self, error: TridentError) -> None:
        """End all requests and commands that run with ``error``, and free what they hold in the engine."""
        with self.lock:
            ended = self._live.fail_all(error)
            self._send_all(ended)
            self._fail_commands(error)
        ended.tell()

    def close(self, drained_for: float = 0.0) -> None:
        """Cancel what is live; when this is the last door of the model that owns the engine, end the engine. A second
        call does nothing.

        ``drained_for``: seconds of ``drain_timeout`` that have passed already.
        """
        with self.lock:
            if self._is_closed:
                return
            self._is_closed = True
            for abort in self._live.cancel_all():
                self._connection.send(abort)
        self._watch.stop()
        status = self.run_directory.read_status() if self._ownership.is_last() else None
        seconds = max(self.drain_timeout - drained_for, 0.0) if status is not None else 0.0
        with self.lock:
            if status is not None:
                self._connection.send(Shutdown(drain_timeout=seconds))
        self._connection.stop()
        if status is not None:
            self._ownership.end_engine(status, None if self.welcome is None else seconds)
            self._watch.reap()
        self.events.close()
        self._ownership.release()

    def receive(self, message: ToDoor) -> None:
        """For the connection: a message has come."""
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

    def stay_down(self, error: TridentError) -> None:
        """For the connection: there is no engine to wait for."""
        with self.lock:
            self._failure = str(error)
            failed = self._live.fail_all(error)
        failed.tell()

    def lose_connection(self) -> None:
        """For the connection, with the lock held: commands will not be answered; generations wait for an engine."""
        self._fail_commands(Overloaded("the engine ended; it is being started again, retry after 2 s"))

    def _check_usable(self) -> None:
        if self._is_closed:
            raise being_unloaded()
        if self._failure:
            raise parse_error(self._failure)

    def _fail_commands(self, error: TridentError) -> None:
        # Whoever takes a reply out is the one to answer it.
        for command_id in list(self._commands):
            reply = self._commands.pop(command_id, None)
            if reply is not None:
                reply.set_exception(error)

    def _wait_until_connected(self) -> None:
        deadline = time.monotonic() + OWNER_WAIT
        while not self._connection.wait_until_open(STATUS_INTERVAL):
            status = self.run_directory.read_status()
            if status is not None and self.run_directory.is_final(status):
                if self._ownership.is_of_this_load(status):
                    raise parse_error(status.error)
            elif status is not None or self._ownership.is_owner:
                continue
            elif time.monotonic() > deadline:
                raise NotFound(f"no model of this server owns the engine; waited {OWNER_WAIT:.0f} s for one to load")

    def _apply(self, message: StepDeltas) -> None:
        with self.lock:
            if self.welcome is None or message.epoch != self.welcome.epoch:
                return
            applied = self._live.apply(message.deltas)
            self._send_all(applied)
        applied.tell()

    def _resubmit(self, welcome: Welcome) -> None:
        """Begin with a new engine process: it knows none of the live generations."""
        with self.lock:
            self.events.attach(self.doors_folder)
            self.welcome = welcome
            self._failure = ""
            self._connection.open(self._live.resubmit())

    def _send_all(self, applied: Applied) -> None:
        for message in applied.messages:
            self._connection.send(message)
