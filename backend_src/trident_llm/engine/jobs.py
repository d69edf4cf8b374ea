"""Jobs: administrative work that outlasts the command that began it. Knows nothing of what the work is."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineFailed, NotFound, known_error
from ..metrics_catalog import JOB_ENDS

_KEPT = 32
"""Jobs that are remembered."""


@dataclass(eq=False)
class Job:
    """``tell`` may be called from any thread."""

    command: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Never used again, by later engines neither."""
    state: str = "running"
    """running, done or failed."""
    progress: str = "starting"
    """One line: what it is doing, or has done."""
    error: str = ""
    """Of a failed one, beginning with its code."""
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    num_ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JOB_ENDS, 0))
    """Jobs like this one by the state they ended in."""

    def tell(self, progress: str) -> None:
        self.progress = progress

    def finish(self, progress: str) -> None:
        self.progress = progress
        self._end("done")

    def fail(self, error: Exception) -> None:
        self.error = str(known_error(error, EngineFailed))
        self._end("failed")

    def describe(self) -> dict[str, Any]:
        seconds = (time.monotonic() if self.ended is None else self.ended) - self.began
        return {
            "id": self.id,
            "command": self.command,
            "state": self.state,
            "progress": self.progress,
            "error": self.error,
            "seconds": round(seconds, 3),
        }

    def _end(self, state: str) -> None:
        self.state, self.ended = state, time.monotonic()
        self.num_ended[state] += 1


class Jobs:
    """Those of one engine process, the last ``_KEPT``. They end with it."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._num_ended = dict.fromkeys(JOB_ENDS, 0)

    def begin(self, command: str) -> Job:
        job = Job(command, num_ended=self._num_ended)
        self._jobs[job.id] = job
        while len(self._jobs) > _KEPT:
            self._jobs.popitem(last=False)
        return job

    def find(self, job_id: str) -> Job:
        """Raises ``NotFound``."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(
                f"id: no job {job_id[:100]!r} in this engine process; the last {_KEPT} are kept, and none outlives it"
            )
        return job

    def describe(self) -> list[dict[str, Any]]:
        """All that are remembered, the newest first."""
        return [job.describe() for job in reversed(self._jobs.values())]

    def counts(self) -> dict[str, int]:
        """Those that run, and all that ended, by state."""
        running = sum(job.state == "running" for job in self._jobs.values())
        return {"running": running, **self._num_ended}
