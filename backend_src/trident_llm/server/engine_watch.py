"""Keeps the engine process of a run directory alive: whichever door holds its file lock starts and restarts it.

When the holder dies another door takes over. Knows processes and files; nothing of sockets, requests or the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from ..config import EngineConfig
from ..deaths import Deaths
from ..errors import BadRequest, EngineFailed, Overloaded, TridentError
from ..run_directory import GAVE_UP, EngineStatus, RunDirectory
from ..step_board import BoardState, read_board

FIRST_BACKOFF = 0.1
"""Seconds before a restart."""
BACKOFF_FACTOR = 5
"""By what that grows with each end in a row before which no step was completed: memory of the last process may take
seconds to be free again."""
LOCK_INTERVAL = 0.2
"""Seconds between two tries to get the lock, and between two looks at the engine."""
OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM)
"""By which others end a process: no request is to blame, unless memory had run out."""


class FileLock:
    """An advisory lock that the kernel releases when its holder dies. Never waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock, or change its kind. False when another process holds it or the folder is gone."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            self.release()
            return False
        if not self.is_current():
            self.release()
            return False
        return True

    def is_current(self) -> bool:
        """Whether the locked file is still the one that others find under its name."""
        try:
            return self._descriptor is not None and os.fstat(self._descriptor).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def wait_for_end(pid: int, seconds: float) -> bool:
    """Whether process ``pid`` has ended (a zombie has), after waiting at most ``seconds`` for it."""
    if pid == GAVE_UP:
        return True
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


class EngineWatch:
    """One thread that holds the watch lock when it can, and then keeps the engine running."""

    def __init__(self, run_directory: RunDirectory, *, owner_pid: int, log: Callable[[str], None]) -> None:
        """``owner_pid``: the server process, with which the engine ends. ``log`` gets one line per event."""
        self._run_directory = run_directory
        self._owner_pid = owner_pid
        self._log = log
        self._lock = FileLock(run_directory.watch_lock_path)
        self._process: subprocess.Popen[bytes] | None = None
        self._hung = False
        """Whether the engine was ended here because a step took too long."""
        self._num_out_of_memory = _count_out_of_memory()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)
        self.is_holder = False
        self.before_release: Callable[[], None] = lambda: None
        """Called by the watch's thread when this door is no holder any more and nobody else is one yet."""

    @property
    def num_restarts(self) -> int:
        return self._run_directory.read_deaths().total

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give the lock up. The engine goes on running."""
        self._stopping.set()
        self._thread.join()

    def reap(self) -> None:
        """Collect the exit status of an engine that this process started and that has ended."""
        if self._process is not None:
            self._process.poll()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._run_directory.exists() and self._lock.acquire():
                self._process = None
                self.is_holder = True
                try:
                    self._keep_running()
                finally:
                    self.is_holder = False
                    self.before_release()
                    self._lock.release()
            self.reap()
            self._stopping.wait(LOCK_INTERVAL)

    def _keep_running(self) -> None:
        """Start the engine whenever none runs and it may be tried, until the run directory goes or the watch stops."""
        last_progress = ""
        while not self._stopping.is_set() and self._lock.is_current():
            status = self._run_directory.read_status()
            if status is None or wait_for_end(status.pid, LOCK_INTERVAL):
                if not self._lock.is_current():
                    return
                if self._may_start(self._run_directory.read_status()):
                    self._spawn()
                else:
                    self._stopping.wait(LOCK_INTERVAL)
            elif status.state == "ready":
                self._end_if_hung(status.pid)
            elif status.progress != last_progress:
                last_progress = status.progress
                self._log(f"engine: {last_progress}")

    def _end_if_hung(self, pid: int) -> None:
        config, board = self._config(), self._board(pid)
        if config is None or board is None or not 0 < config.step_timeout < board.busy_seconds:
            return
        self._log(f"the engine process is at one step for {board.busy_seconds:.1f} s (step_timeout); ending it")
        self._hung = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _may_start(self, status: EngineStatus | None) -> bool:
        """Decide about the engine that left ``status``; waits for the backoff of a restart."""
        if status is None:
            return True
        self.reap()
        deaths = self._run_directory.read_deaths()
        if self._run_directory.is_final(status):
            return False
        how = self._describe_end()
        if status.state == "loading" and not deaths.total:
            reason = f"the engine process {how} while it was loading; the server's log may say why"
            self._give_up(EngineFailed(reason))
            return False
        deaths = self._record_death(status.pid, deaths)
        config = self._config()
        if config is not None and deaths.in_a_row >= config.max_engine_failures:
            times = f"{deaths.in_a_row} times in a row without completing a step (max_engine_failures)"
            self._give_up(Overloaded(f"the engine process {how}, {times}; it stays down until it is loaded again"))
            return False
        backoff = FIRST_BACKOFF * BACKOFF_FACTOR**deaths.in_a_row
        self._log(f"the engine process {how}; starting it again in {backoff:.1f} s")
        return not self._stopping.wait(backoff) and self._lock.is_current()

    def _record_death(self, pid: int, before: Deaths) -> Deaths:
        """Write down that the engine ``pid`` has died, and with which requests."""
        board = self._board(pid)
        deaths = before.after(
            board.request_ids if board else (),
            num_completed=board.num_completed if board else 0,
            blames_requests=self._may_blame_requests(),
        )
        self._run_directory.write_deaths(deaths)
        for request_id in deaths.condemned.keys() - before.condemned.keys():
            count = deaths.condemned[request_id]
            self._log(f"request {request_id} ended the engine process {count} times; refusing it")
        return deaths

    def _may_blame_requests(self) -> bool:
        """False when another process has ended the engine."""
        hung, self._hung = self._hung, False
        before, self._num_out_of_memory = self._num_out_of_memory, _count_out_of_memory()
        code = None if self._process is None else self._process.returncode
        return hung or code is None or -code not in OUTSIDE_SIGNALS or self._num_out_of_memory > before

    def _board(self, pid: int) -> BoardState | None:
        """What the engine ``pid`` is doing, or did last."""
        board = read_board(self._run_directory.board_path)
        return board if board is not None and board.pid == pid else None

    def _config(self) -> EngineConfig | None:
        launch = self._run_directory.read_launch()
        try:
            return None if launch is None else EngineConfig.from_parameters(launch.parameters)
        except BadRequest:
            return None

    def _describe_end(self) -> str:
        code = None if self._process is None else self._process.returncode
        if code is None:
            return "ended"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"

    def _give_up(self, error: TridentError) -> None:
        self._log(error.message)
        self._run_directory.write_status(EngineStatus(state="failed", pid=GAVE_UP, error=str(error)))

    def _spawn(self) -> None:
        launch = self._run_directory.read_launch()
        if launch is None:
            return
        command = [*launch.command, "--run-dir", str(self._run_directory.path), "--owner-pid", str(self._owner_pid)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            self._give_up(EngineFailed(f"the engine process could not be started: {error}"))
            return
        status = EngineStatus(state="loading", pid=self._process.pid, progress="starting the engine process")
        self._run_directory.write_status(status)


def _count_out_of_memory() -> int:
    """Processes that the kernel has ended because memory had run out, since it started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
