"""The engine process: one loop between the doors' socket and the engine core.

Run as ``python -m trident_llm.engine.process --run-dir DIR --owner-pid PID``. It lives as long as its owner, the
server process, and never waits for a door. It knows neither the server nor text.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from ..config import EngineConfig
from ..errors import EngineFailed, LoadFailed, TridentError
from ..protocol import Abort, Command, CommandReply, Delta, Hello, Shutdown, Submit, Welcome
from ..run_directory import EngineStatus, RunDirectory
from .transport import DoorSocket, Received

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 200
"""How long the idle loop waits for a message before it looks around."""
PENDING_POLL_MS = 5
"""The same while deltas wait for a slow door."""


class Core(Protocol):
    """What the process needs of the engine core."""

    def welcome(self, epoch: str) -> Welcome: ...
    def add(self, submit: Submit) -> None: ...
    def abort(self, request_id: str, sample_index: int | None = None) -> None: ...
    def step(self) -> list[Delta]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> dict[str, Any]: ...
    def check_integrity(self) -> None: ...


CoreFactory = Callable[[EngineConfig, Callable[[str], None]], Core]


class EngineLoop:
    """Routes messages to the core and the core's deltas to the doors they belong to."""

    def __init__(self, core: Core, config: EngineConfig, socket: DoorSocket, epoch: str) -> None:
        self._core = core
        self._config = config
        self._socket = socket
        self._epoch = epoch
        self._started = time.monotonic()
        self._doors: dict[str, bytes] = {}
        """Door of each live request."""
        self._open_samples: dict[str, set[int]] = {}
        """Samples of each live request that have not finished."""
        self._stopping = False

    def run(self) -> None:
        """Serve until a door sends ``Shutdown``. An exception of the core's step is let through."""
        was_busy = False
        while not self._stopping:
            busy = self._core.has_work()
            if was_busy and not busy:
                self._core.check_integrity()
            was_busy = busy
            idle_timeout = PENDING_POLL_MS if self._socket.has_pending else IDLE_POLL_MS
            for received in self._socket.receive(0 if busy else idle_timeout):
                self._handle(received)
            if self._core.has_work():
                for delta in self._core.step():
                    self._route(delta)
            self._flush()

    def _handle(self, received: Received) -> None:
        message = received.message
        if isinstance(message, Submit):
            self._submit(received.door, message)
        elif isinstance(message, Abort):
            self._abort(message)
        elif isinstance(message, Hello):
            self._socket.post(received.door, self._core.welcome(self._epoch))
        elif isinstance(message, Command):
            self._socket.post(received.door, self._run_command(message))
        elif isinstance(message, Shutdown):
            self._stopping = True

    def _submit(self, door: bytes, submit: Submit) -> None:
        if submit.request_id in self._doors:
            logger.warning("dropped a second submission of request %s", submit.request_id)
            return
        try:
            self._core.add(submit)
        except TridentError as error:
            for sample in submit.samples:
                self._socket.post_delta(door, _error_delta(submit.request_id, sample.index, sample.output_ids, error))
            return
        self._doors[submit.request_id] = door
        self._open_samples[submit.request_id] = {sample.index for sample in submit.samples}

    def _abort(self, abort: Abort) -> None:
        if abort.request_id in self._doors:
            self._core.abort(abort.request_id, abort.sample_index)
            self._forget(abort.request_id, abort.sample_index)

    def _forget(self, request_id: str, sample_index: int | None) -> None:
        """Drop a finished or aborted sample (None: the whole request) from the books."""
        open_samples = self._open_samples[request_id]
        if sample_index is not None:
            open_samples.discard(sample_index)
        if sample_index is None or not open_samples:
            del self._open_samples[request_id], self._doors[request_id]

    def _route(self, delta: Delta) -> None:
        door = self._doors.get(delta.request_id)
        if door is None:
            return
        if delta.finish_reason is not None:
            self._forget(delta.request_id, delta.sample_index)
        self._socket.post_delta(door, delta)

    def _flush(self) -> None:
        undelivered = self._socket.flush()
        for door in undelivered.gone:
            self._give_up(door)
        for door in undelivered.stalled:
            error = EngineFailed("the server process that reads this request's output stalled; the request was dropped")
            for request_id, samples in self._give_up(door).items():
                for index in samples:
                    self._socket.post_delta(door, _error_delta(request_id, index, [], error))

    def _give_up(self, door: bytes) -> dict[str, set[int]]:
        """Abort every request of ``door``; returns their open samples."""
        given_up = {key: self._open_samples[key] for key, owner in self._doors.items() if owner == door}
        for request_id in given_up:
            self._core.abort(request_id)
            self._forget(request_id, None)
        return given_up

    def _run_command(self, command: Command) -> CommandReply:
        results: dict[str, Callable[[], dict[str, Any]]] = {
            "stats": lambda: self._core.stats(),
            "config": lambda: self._config.to_dict(),
            "health": lambda: {"ready": True},
        }
        result = results.get(command.command)
        if result is None:
            error = f"[INVALID_ARG] command: {command.command!r} is not one of {', '.join(results)}"
            return CommandReply(command_id=command.command_id, error=error)
        process = {"epoch": self._epoch, "pid": os.getpid(), "uptime_seconds": time.monotonic() - self._started}
        extra = {} if command.command == "config" else process
        return CommandReply(command_id=command.command_id, result={**result(), **extra})


def _error_delta(request_id: str, sample_index: int, output_ids: list[int], error: TridentError) -> Delta:
    return Delta(
        request_id=request_id,
        sample_index=sample_index,
        offset=len(output_ids),
        token_ids=[],
        finish_reason="error",
        error=str(error),
    )


class _StatusReporter:
    """Writes the process's state to the run directory, progress at most ten times a second."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._run_directory = run_directory
        self._last_progress = 0.0

    def progress(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last_progress >= 0.1:
            self._last_progress = now
            self._write(EngineStatus(state="loading", pid=os.getpid(), progress=text))

    def ready(self) -> None:
        self._write(EngineStatus(state="ready", pid=os.getpid()))

    def failed(self, error: TridentError) -> None:
        self._write(EngineStatus(state="failed", pid=os.getpid(), error=str(error)))

    def _write(self, status: EngineStatus) -> None:
        self._run_directory.write_status(status)


def _watch_owner(owner_pid: int, run_directory: RunDirectory) -> None:
    """Start a thread that ends this process, whatever it is doing, when its owner has gone."""

    def end() -> NoReturn:
        run_directory.remove()
        os._exit(0)

    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        end()

    def watch() -> None:
        select.select([owner], [], [])
        end()

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


def _stop_on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _load_core(config: EngineConfig, progress: Callable[[str], None]) -> Core:
    from .engine import EngineCore

    return EngineCore(config, progress=progress)


def main(arguments: Sequence[str] | None = None, core_factory: CoreFactory = _load_core) -> int:
    """Load the core and serve it. Returns the exit status: 0 asked to end, 1 the engine broke, 2 it did not load."""
    parser = argparse.ArgumentParser(prog="trident_llm.engine.process")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--owner-pid", type=int, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s engine %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_directory = RunDirectory(options.run_dir)
    _watch_owner(options.owner_pid, run_directory)
    status = _StatusReporter(run_directory)
    status.progress("starting")
    try:
        launch = run_directory.read_launch()
        if launch is None:
            raise LoadFailed(f"no launch settings in {str(run_directory.path)!r}")
        config = EngineConfig.from_parameters(launch.parameters)
        core = core_factory(config, status.progress)
    except Exception as error:
        if not isinstance(error, TridentError):
            traceback.print_exc()
            error = LoadFailed(f"the engine could not be loaded: {type(error).__name__}: {error}")
        status.failed(error)
        return 2
    gc.collect()
    gc.freeze()
    return _serve(core, config, run_directory, status)


def _serve(core: Core, config: EngineConfig, run_directory: RunDirectory, status: _StatusReporter) -> int:
    epoch = uuid.uuid4().hex
    run_directory.socket_path.unlink(missing_ok=True)
    socket = DoorSocket(run_directory.address, epoch)
    try:
        status.ready()
        EngineLoop(core, config, socket, epoch).run()
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        socket.close()
    run_directory.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
