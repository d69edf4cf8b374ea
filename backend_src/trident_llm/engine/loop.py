"""The loop of the engine process: messages of the doors go to the core, its deltas to the doors they belong to.

It never waits for a door. It knows neither the server nor text, and nothing of processes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from ..commands import ENGINE_COMMANDS
from ..config import EngineConfig
from ..errors import EngineFailed, Overloaded, TridentError
from ..logs import RequestLog
from ..protocol import Abort, Command, CommandReply, Delta, Hello, Shutdown, Submit, Welcome
from ..step_board import StepBoard
from .probation import Probation
from .request_metrics import RequestMetrics
from .transport import DoorSocket, Received

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 200
"""How long the idle loop waits for a message before it looks around."""
PENDING_POLL_MS = 5
"""The same while deltas wait for a slow door."""


class Core(Protocol):
    """What the process needs of the engine core."""

    on_launch: Callable[[Iterable[str]], None]
    on_complete: Callable[[], None]
    request_metrics: RequestMetrics

    @property
    def config(self) -> EngineConfig: ...
    @property
    def is_loading(self) -> bool: ...
    def welcome(self, epoch: str) -> Welcome: ...
    def add(self, submit: Submit) -> None: ...
    def abort(self, request_id: str, sample_index: int | None = None) -> None: ...
    def step(self) -> list[Delta]: ...
    def poll(self) -> list[Delta]: ...
    def has_work(self) -> bool: ...
    @property
    def num_places(self) -> int: ...
    def run_command(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]: ...
    def stats(self) -> dict[str, Any]: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...


CoreFactory = Callable[[EngineConfig, Callable[[str], None]], Core]


@dataclass(frozen=True)
class _RunningCommand:
    door: bytes
    command_id: int
    result: Future[dict[str, Any]]


class EngineLoop:
    """Routes messages to the core and the core's deltas to the doors they belong to."""

    def __init__(
        self,
        core: Core,
        socket: DoorSocket,
        epoch: str,
        *,
        board: StepBoard,
        probation: Probation,
        test_totals: Mapping[str, float] | None = None,
    ) -> None:
        """``test_totals``: what the core had counted before it was ready, by the names of ``stats``."""
        self._core = core
        self._test_totals = test_totals or {}
        self._board = board
        self._probation = probation
        core.on_launch, core.on_complete = board.begin, board.complete
        self._socket = socket
        self._epoch = epoch
        self._started = time.monotonic()
        self._log = RequestLog(logger)
        self._doors: dict[str, bytes] = {}
        """Door of each live request."""
        self._open_samples: dict[str, set[int]] = {}
        """Samples of each live request that have not finished."""
        self._unanswered: list[_RunningCommand] = []
        self._drained_at: float | None = None
        """When to end although requests run, on the monotonic clock; None: not at all."""

    def run(self) -> None:
        """Serve until a door sends ``Shutdown``. An exception of the core's step is let through."""
        was_busy = False
        self._board.set_places(self._core.num_places)
        while not self._is_drained():
            busy = self._core.has_work()
            if was_busy and not busy:
                self._core.check_integrity()
            was_busy = busy
            idle_timeout = PENDING_POLL_MS if self._has_pending() else IDLE_POLL_MS
            messages = self._socket.receive(0 if busy else idle_timeout)
            self._board.busy()
            for received in messages:
                self._handle(received)
            for waiting in self._probation.release(core_has_work=self._core.has_work()):
                self._add(waiting.door, waiting.submit)
            # Doors refuse what is beyond at once: the step that follows may take long.
            self._board.set_places(self._core.num_places)
            # A step begins with a poll.
            for delta in self._core.step() if self._core.has_work() else self._core.poll():
                self._route(delta)
            self._answer_commands()
            self._flush()
            self._board.set_places(self._core.num_places)
            self._board.idle()

    def _has_pending(self) -> bool:
        unfinished = bool(self._unanswered) or self._probation.is_active or self._core.is_loading
        return unfinished or self._socket.has_pending

    def _is_drained(self) -> bool:
        if self._drained_at is None:
            return False
        return time.monotonic() >= self._drained_at or not (self._doors or self._socket.has_pending)

    def _handle(self, received: Received) -> None:
        message = received.message
        if isinstance(message, Submit):
            self._submit(received.door, message)
        elif isinstance(message, Abort):
            self._abort(message)
        elif isinstance(message, Hello):
            self._socket.post(received.door, self._core.welcome(self._epoch))
        elif isinstance(message, Command):
            self._run_command(received.door, message)
        elif isinstance(message, Shutdown):
            self._drained_at = time.monotonic() + message.drain_timeout

    def _submit(self, door: bytes, submit: Submit) -> None:
        if submit.request_id in self._doors:
            logger.warning("dropped a second submission of request %s", submit.request_id)
            return
        try:
            self._probation.check(submit)
            if self._drained_at is not None:
                raise Overloaded("the engine is being ended; retry after 2 s")
        except TridentError as error:
            self._refuse(door, submit, error)
            return
        self._doors[submit.request_id] = door
        self._open_samples[submit.request_id] = {sample.index for sample in submit.samples}
        if not self._probation.hold(door, submit):
            self._add(door, submit)

    def _add(self, door: bytes, submit: Submit) -> None:
        """Hand a registered request to the core."""
        refusal = None
        with self._board.adding(submit.request_id):
            try:
                self._core.add(submit)
            except TridentError as error:
                refusal = error
        if refusal is not None:
            self._forget(submit.request_id, None)
            self._refuse(door, submit, refusal)
        else:
            num_prompt_tokens = len(submit.prompt_ids)
            self._log.begin("accepted", submit.request_id, submit.client_id, prompt_tokens=num_prompt_tokens)

    def _refuse(self, door: bytes, submit: Submit, error: TridentError) -> None:
        self._log.end("refused", submit.request_id, client_id=submit.client_id, error=str(error))
        for sample in submit.samples:
            self._socket.post_delta(door, _error_delta(submit.request_id, sample.index, sample.output_ids, error))

    def _abort(self, abort: Abort) -> None:
        if abort.request_id in self._doors:
            self._core.abort(abort.request_id, abort.sample_index)
            self._forget(abort.request_id, abort.sample_index)
            self._log_end(abort.request_id, "aborted" if abort.sample_index is None else "finished")

    def _forget(self, request_id: str, sample_index: int | None) -> None:
        """Drop a finished or aborted sample (None: the whole request) from the books."""
        open_samples = self._open_samples[request_id]
        if sample_index is not None:
            open_samples.discard(sample_index)
        if sample_index is None or not open_samples:
            del self._open_samples[request_id], self._doors[request_id]
            self._probation.ended(request_id)

    def _route(self, delta: Delta) -> None:
        door = self._doors.get(delta.request_id)
        if door is None:
            return
        if self._probation.saw(delta):
            self._core.abort(delta.request_id)
        if delta.finish_reason is not None:
            self._forget(delta.request_id, delta.sample_index)
            self._log_end(delta.request_id, "finished", reason=delta.finish_reason, error=delta.error)
        self._socket.post_delta(door, delta)

    def _log_end(self, request_id: str, event: str, **fields: object) -> None:
        """Of a request whose last sample may have ended."""
        if request_id not in self._doors:
            self._log.end(event, request_id, **fields)

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
            self._log_end(request_id, "given up")
        return given_up

    def _run_command(self, door: bytes, command: Command) -> None:
        if command.command in ENGINE_COMMANDS:
            result = self._core.run_command(command.command, command.arguments)
            self._unanswered.append(_RunningCommand(door, command.command_id, result))
        else:
            self._socket.post(door, self._answer_at_once(command))

    def _answer_commands(self) -> None:
        """Send the results of commands that have ended."""
        for running in [running for running in self._unanswered if running.result.done()]:
            self._unanswered.remove(running)
            error = running.result.exception()
            if error is None:
                reply = CommandReply(command_id=running.command_id, result=running.result.result())
            else:
                reply = CommandReply(command_id=running.command_id, error=str(error))
            self._socket.post(running.door, reply)

    def _answer_at_once(self, command: Command) -> CommandReply:
        results: dict[str, Callable[[], dict[str, Any]]] = {
            "stats": self._stats,
            "config": lambda: self._core.config.to_dict(),
            "health": lambda: {"ready": True},
            "metrics": lambda: {**self._stats(), "histograms": self._core.request_metrics.to_dict()},
        }
        result = results.get(command.command)
        if result is None:
            known = ", ".join([*results, *ENGINE_COMMANDS])
            error = f"[INVALID_ARG] command: {command.command!r} is not one of {known}"
            return CommandReply(command_id=command.command_id, error=error)
        process = {"epoch": self._epoch, "pid": os.getpid(), "uptime_seconds": time.monotonic() - self._started}
        extra = {} if command.command == "config" else process
        return CommandReply(command_id=command.command_id, result={**result(), **extra})

    def _stats(self) -> dict[str, Any]:
        stats = self._core.stats()
        return stats | {name: stats[name] - total for name, total in self._test_totals.items()}


def _error_delta(request_id: str, sample_index: int, output_ids: list[int], error: TridentError) -> Delta:
    return Delta(
        request_id=request_id,
        sample_index=sample_index,
        offset=len(output_ids),
        token_ids=[],
        finish_reason="error",
        error=str(error),
    )
