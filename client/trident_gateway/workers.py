"""Serving by one process alone, or by workers that a supervisor starts, replaces when they die, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from trident_client import Overloaded

from .app import create_app
from .running import Memory, Running, clear, shared_memory

_RESTART_SECONDS = 1.0
"""From one start of a worker to the next, at least."""
_END_SECONDS = 5.0
"""What a worker may take to end beyond the time for its requests."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``urls``: as ``create_app`` takes them; ``drain_timeout``: seconds."""

    urls: Sequence[str]
    api_key: str = field(repr=False)
    admin_token: str = field(repr=False)
    load_factor: float
    drain_timeout: int


def serve_alone(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """Serve in this process until SIGTERM or SIGINT."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it after the end, for whoever called it
        _server(settings, Running()).run(list(sockets))


class Supervisor:
    """A worker process for each list of ``sockets``, which become this object's to close.

    uvicorn's own supervisor is not enough: its workers share one listening socket, live on when it is killed, and have
    no number by which they could count in shared memory.
    """

    def __init__(self, settings: Settings, sockets: Sequence[Sequence[socket.socket]]) -> None:
        self._settings = settings
        self._sockets = sockets
        self._context = multiprocessing.get_context("spawn")
        self._memory = shared_memory(self._context, len(sockets))
        self._workers: dict[int, BaseProcess] = {}
        self._due = dict.fromkeys(range(len(sockets)), 0.0)
        """When a worker may be started next."""

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises ``Overloaded`` when a worker cannot start."""
        with _readable_signals(signal.SIGTERM, signal.SIGINT) as signals:
            try:
                while not self._wait(signals, self._start_due()):
                    self._note_ends()
                number = signals.recv(1)[0]
            finally:
                self._end(signals)
        if number == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # what started this process sees how it ended

    def _wait(self, signals: socket.socket, timeout: float | None) -> bool:
        """Wait until a signal has come, which is True, or a worker has ended, or the time is over."""
        return signals in wait([signals, *(worker.sentinel for worker in self._workers.values())], timeout)

    def _start_due(self) -> float | None:
        """Start the workers that are missing, and return seconds until others may be; None when none is missing."""
        missing = [number for number in self._due if number not in self._workers]
        for number in missing:
            if time.monotonic() >= self._due[number]:
                self._due[number] = time.monotonic() + _RESTART_SECONDS
                self._start(number)
        waits = [self._due[number] - time.monotonic() for number in missing if number not in self._workers]
        return max(0.0, min(waits)) if waits else None

    def _start(self, number: int) -> None:
        arguments = (self._settings, self._sockets[number], self._memory, number)
        worker = self._context.Process(target=_work, args=arguments, name=f"gateway-{number}", daemon=True)
        # A terminal sends Ctrl-C to all processes, but the supervisor is to say when workers end.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            worker.start()
        except OSError as error:
            _log.warning("worker %d of the gateway cannot be started now: %s", number, error)
        else:
            self._workers[number] = worker
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _note_ends(self) -> None:
        for number, worker in [*self._workers.items()]:
            if worker.exitcode is None:
                continue
            if worker.exitcode == STARTUP_FAILURE:
                raise Overloaded(f"worker {number} of the gateway could not start; what it wrote says why")
            _log.warning("worker %d of the gateway ended with exit code %d; starting another", number, worker.exitcode)
            clear(self._memory, number)
            del self._workers[number]

    def _end(self, signals: socket.socket) -> None:
        """End all workers: at once after another signal, or when they take too long."""
        for listener in (listener for own in self._sockets for listener in own):
            listener.close()
        for worker in self._workers.values():
            worker.terminate()
        deadline = time.monotonic() + self._settings.drain_timeout + _END_SECONDS
        while alive := [worker for worker in self._workers.values() if worker.is_alive()]:
            ready = wait([signals, *(worker.sentinel for worker in alive)], max(0.0, deadline - time.monotonic()))
            if signals in ready or not ready:
                break
        for worker in self._workers.values():
            worker.kill()
            worker.join()


def _work(settings: Settings, sockets: Sequence[socket.socket], memory: Memory, number: int) -> None:
    """A worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if number:
        # What this package warns of is the same in all workers; the first says it.
        logging.getLogger(__package__).setLevel(logging.ERROR)
    try:
        server = _server(settings, Running(memory, number))
    except Exception as error:
        _log.error("worker %d of the gateway: %s", number, error)
        sys.exit(STARTUP_FAILURE)
    server.run(list(sockets))


def _end_with_parent() -> None:
    """Drain and end when the supervisor is gone, even by SIGKILL: then a pipe closes that multiprocessing has made."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _server(settings: Settings, running: Running) -> uvicorn.Server:
    app = create_app(
        settings.urls,
        api_key=settings.api_key,
        admin_token=settings.admin_token,
        load_factor=settings.load_factor,
        running=running,
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=settings.drain_timeout
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_cut_request)
    gc.freeze()  # what is there by now stays: collecting garbage while serving need not look at it
    return uvicorn.Server(config)


def _is_no_cut_request(record: logging.LogRecord) -> bool:
    """A filter: of the requests that the end of the drain time cuts off uvicorn says how many, then shows each."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextlib.contextmanager
def _readable_signals(*numbers: signal.Signals) -> Iterator[socket.socket]:
    """A socket from which the number of each such signal can be read, a byte each, once it has come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield ours
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
