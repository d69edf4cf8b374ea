"""Keeps the engine process of a run directory alive: whichever door holds its file lock starts and restarts it.

When the holder dies another door takes over. Knows processes and files; nothing of sockets, requests or the server.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import EngineFailed
from ..run_directory import GAVE_UP, EngineStatus, RunDirectory

MAX_FAILURES = 5
FAILURE_WINDOW = 60.0
"""Seconds in which ``MAX_FAILURES`` unasked ends of the engine make the watch give up."""
FIRST_BACKOFF = 0.1
"""Seconds before the first restart; doubled for each further one in the window."""
LOCK_INTERVAL = 0.2
"""Seconds between two tries to get the lock."""


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

    def __init__(
        self, run_directory: RunDirectory, *, owner_pid: int, forget_failures: bool, log: Callable[[str], None]
    ) -> None:
        """``owner_pid``: the server process, with which the engine ends. ``log`` gets one line per event.
        ``forget_failures``: failures from before now do not count; the model is being loaded again."""
        self._run_directory = run_directory
        self._owner_pid = owner_pid
        self._log = log
        self._lock = FileLock(run_directory.watch_lock_path)
        self._process: subprocess.Popen[bytes] | None = None
        self._forget_failures_before = time.time() if forget_failures else 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)
        self.is_holder = False

    @property
    def num_restarts(self) -> int:
        return len(self._run_directory.read_failures())

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
                    self._lock.release()
            self._stopping.wait(LOCK_INTERVAL)

    def _keep_running(self) -> None:
        """Start the engine whenever none runs, until the run directory goes, the watch stops or it gives up."""
        last_progress = ""
        while not self._stopping.is_set() and self._lock.is_current():
            status = self._run_directory.read_status()
            if status is None or wait_for_end(status.pid, LOCK_INTERVAL):
                if not self._lock.is_current() or not self._may_start(self._run_directory.read_status()):
                    return
                self._spawn()
            elif status.state == "loading" and status.progress != last_progress:
                last_progress = status.progress
                self._log(f"engine: {last_progress}")

    def _may_start(self, status: EngineStatus | None) -> bool:
        """Decide about the engine that left ``status``; waits for the backoff of a restart."""
        if status is None:
            return True
        self.reap()
        failures = self._run_directory.read_failures()
        if status.state == "failed":
            if status.written_at < self._forget_failures_before:
                self._run_directory.write_failures([])
                return True
            if self._run_directory.is_final(status):
                return False
        how = self._describe_end()
        if status.state == "loading" and not failures:
            self._give_up(f"the engine process {how} while it was loading; the server's log may say why")
            return False
        failures.append(time.time())
        self._run_directory.write_failures(failures)
        recent = sum(moment > time.time() - FAILURE_WINDOW for moment in failures)
        if recent >= MAX_FAILURES:
            self._give_up(f"the engine process {how}, {recent} times within {FAILURE_WINDOW:.0f} s; it stays down")
            return False
        backoff = FIRST_BACKOFF * 2 ** (recent - 1)
        self._log(f"the engine process {how}; starting it again in {backoff:.1f} s")
        return not self._stopping.wait(backoff) and self._lock.is_current()

    def _describe_end(self) -> str:
        code = None if self._process is None else self._process.returncode
        if code is None:
            return "ended"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"

    def _give_up(self, reason: str) -> None:
        self._log(reason)
        self._run_directory.write_status(EngineStatus(state="failed", pid=GAVE_UP, error=str(EngineFailed(reason))))

    def _spawn(self) -> None:
        launch = self._run_directory.read_launch()
        if launch is None:
            return
        command = [*launch.command, "--run-dir", str(self._run_directory.path), "--owner-pid", str(self._owner_pid)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            self._give_up(f"the engine process could not be started: {error}")
            return
        status = EngineStatus(state="loading", pid=self._process.pid, progress="starting the engine process")
        self._run_directory.write_status(status)
