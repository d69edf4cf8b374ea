"""What a door has of the engine that its model owns: all doors of the owning model share it, and the last one that
lets go ends the engine.

Knows the run directory and processes; neither requests nor the server's API.
"""

from __future__ import annotations

import os
import time

from ..config import EngineConfig
from ..deaths import Deaths
from ..errors import EngineFailed
from ..run_directory import EngineStatus, Launch, RunDirectory
from .engine_watch import FileLock, wait_for_end

SHUTDOWN_WAIT = 3.0
"""Seconds the engine gets to end when asked, before it is killed; and after it has failed to load, before the next one
is started."""


class EngineOwnership:
    """A share in the engine of ``run_directory``; none where another model owns it."""

    def __init__(self, run_directory: RunDirectory, launch: Launch | None) -> None:
        """``launch``: how to start the engine; None: this door's model does not own it."""
        self._run_directory = run_directory
        self._launch = launch
        self._lock = FileLock(run_directory.owners_lock_path)
        self._created_at = time.time()

    @property
    def is_owner(self) -> bool:
        return self._launch is not None

    @property
    def drain_timeout(self) -> float:
        """Seconds that running requests may take to finish when the engine, or their own model, is to end. Without an
        engine there is nothing to wait for."""
        launch = self._launch or self._run_directory.read_launch()
        return 0.0 if launch is None else EngineConfig.from_parameters(launch.parameters).drain_timeout

    def claim(self) -> None:
        """Make the run directory, or join one that has the same settings. An engine that stays down is forgotten, once
        its process has ended or ``SHUTDOWN_WAIT`` has passed: it will be started again.

        Raises ``EngineFailed`` when the engine runs with other settings.
        """
        if self._launch is None:
            return
        self._run_directory.create()
        self._run_directory.remove_stale_siblings()
        self._lock.acquire(shared=True)
        present = self._run_directory.read_launch()
        status = self._run_directory.read_status()
        stays_down = status is not None and status.state == "failed" and not self.is_of_this_load(status)
        # One that says it has failed still has to end, and to free its memory.
        ended = status is None or wait_for_end(status.pid, SHUTDOWN_WAIT if stays_down else 0) or stays_down
        if not ended and present is not None and present != self._launch:
            self._lock.release()
            raise EngineFailed("the engine still runs with other settings; unload the model first, then load it")
        if present != self._launch:
            self._run_directory.forget_requantized()
            self._run_directory.write_launch(self._launch)
        if stays_down:
            self._run_directory.write_deaths(Deaths())
            self._run_directory.forget_requantized()
            self._run_directory.clear_status()

    def is_of_this_load(self, status: EngineStatus) -> bool:
        """Whether ``status`` is not left from a load before. To a door that owns nothing, all are news."""
        return self._launch is None or status.written_at >= self._created_at

    def is_last(self) -> bool:
        """Whether no other door has a share. From then on none gets one before this one is released."""
        return self.is_owner and self._lock.acquire()

    def end_engine(self, status: EngineStatus, seconds: float | None) -> None:
        """Wait for the engine, which was asked to end within ``seconds`` (None: it was not asked); kill it when it does
        not."""
        if self._run_directory.is_final(status):
            self._run_directory.remove()
        elif not wait_for_end(status.pid, 0.0 if seconds is None else seconds + SHUTDOWN_WAIT):
            self._run_directory.remove()
            os.kill(status.pid, 9)
            wait_for_end(status.pid, SHUTDOWN_WAIT)

    def release(self) -> None:
        self._lock.release()
