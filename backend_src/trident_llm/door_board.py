"""What the doors of one engine have done, each in a small file of its own in the run folder, which any can sum up.

A door's file outlives it, so that totals never fall; what it does now counts while its process lives. Knows neither
requests nor how metrics are published.
"""

from __future__ import annotations

import mmap
import os
import struct
import uuid
from pathlib import Path

from .metrics_catalog import SERVER_COUNTERS

_OWN = "engine_restarts_total"
"""A counter of the server that no door counts."""
TOTALS = tuple(key for spec in SERVER_COUNTERS if spec.name != _OWN for key in spec.series)
_INDEX = {key: index for index, key in enumerate(TOTALS)}
_LIVE, _PID = len(TOTALS), len(TOTALS) + 1
_LAYOUT = struct.Struct(f"={len(TOTALS) + 2}q")
_SUFFIX = ".door"


class DoorBoard:
    """A door's side: an addition to shared memory, no system call. Each total needs a thread or lock of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _LAYOUT.size)
            self._memory = mmap.mmap(descriptor, _LAYOUT.size)
        finally:
            os.close(descriptor)
        self._numbers = memoryview(self._memory).cast("q")
        self._numbers[_PID] = os.getpid()

    def add(self, key: str) -> None:
        """Count one more of ``TOTALS``."""
        self._numbers[_INDEX[key]] += 1

    def set_live(self, num_requests: int) -> None:
        """Requests that this door has accepted and not ended."""
        self._numbers[_LIVE] = num_requests

    def close(self) -> None:
        self._numbers[_PID] = 0
        self._numbers.release()
        self._memory.close()


def read_doors(folder: Path) -> dict[str, int]:
    """``TOTALS`` summed over all doors that there were, and the gauges ``doors`` and ``door_requests``."""
    totals = [0] * len(TOTALS)
    doors = door_requests = 0
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        if len(content) != _LAYOUT.size:
            continue
        numbers = _LAYOUT.unpack(content)
        totals = [total + number for total, number in zip(totals, numbers, strict=False)]
        if numbers[_PID] and Path(f"/proc/{numbers[_PID]}").exists():
            doors, door_requests = doors + 1, door_requests + numbers[_LIVE]
    return {**dict(zip(TOTALS, totals, strict=True)), "doors": doors, "door_requests": door_requests}
