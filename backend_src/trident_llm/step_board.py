"""What the engine process is doing right now, in a small file that it shares with the doors: requests of the steps in
flight, since when it is busy, and how many more requests it takes. It outlives the engine, whatever ends that.

Knows neither messages nor processes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("=qqqq")
"""Process id, completed steps, since when it is busy in monotonic nanoseconds (0: it is not), free places."""
_COMPLETED, _BUSY_SINCE, _PLACES = 1, 2, 3
_SLOT = struct.Struct("<QI")
"""Number of the step, from 1 on, and bytes of its ids."""
_NUM_STEPS = 2
"""A step may be launched while the one before runs, no more."""
_ADDING = _NUM_STEPS
"""The slot beside theirs, for a request that is being taken in."""
_NUM_SLOTS = _NUM_STEPS + 1
_NEVER_COMPLETED = 2**64 - 1
_ID_BYTES = 64
"""Room for one request id with its separator."""
_SEPARATOR = b"\n"


@dataclass(frozen=True)
class BoardState:
    """One look at a board."""

    pid: int
    num_completed: int
    """Steps since the engine was ready."""
    request_ids: frozenset[str]
    """Requests of the steps that have begun and not ended, or the one that is being taken in."""
    busy_seconds: float
    """For how long it has been at what it is doing; 0 when it waits for messages."""
    num_places: int
    """Requests that it would still queue."""


class StepBoard:
    """The engine's side. Every method takes about a microsecond and no system call."""

    def __init__(self, path: Path, max_num_seqs: int) -> None:
        self._slot_bytes = _SLOT.size + _ID_BYTES * max_num_seqs
        size = _HEADER.size + _NUM_SLOTS * self._slot_bytes
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        # Readers do not wait: each number is written whole, which struct.pack_into would not do.
        self._header = memoryview(self._memory)[: _HEADER.size].cast("q")
        self._header[0] = os.getpid()
        self._num_begun = 0

    def begin(self, request_ids: Iterable[str]) -> None:
        """A step with these requests is about to be launched."""
        self._num_begun += 1
        self._write_slot(self._num_begun % _NUM_STEPS, self._num_begun, request_ids)

    def complete(self) -> None:
        """The oldest step that has begun has ended."""
        self._header[_COMPLETED] += 1

    @contextlib.contextmanager
    def adding(self, request_id: str) -> Iterator[None]:
        """A request is being taken in. An exception leaves its name behind."""
        self._write_slot(_ADDING, _NEVER_COMPLETED, (request_id,))
        yield
        self._write_slot(_ADDING, 0, ())

    def busy(self) -> None:
        """Something begins that should not take long."""
        self._header[_BUSY_SINCE] = time.monotonic_ns()

    def idle(self) -> None:
        """It has ended."""
        self._header[_BUSY_SINCE] = 0

    def set_places(self, num_places: int) -> None:
        """``num_places``: see ``BoardState``."""
        self._header[_PLACES] = num_places

    def close(self) -> None:
        self._header.release()
        self._memory.close()

    def _write_slot(self, slot: int, number: int, request_ids: Iterable[str]) -> None:
        ids = _SEPARATOR.join(request_id.encode() for request_id in request_ids)[: self._slot_bytes - _SLOT.size]
        offset = _HEADER.size + slot * self._slot_bytes
        self._memory[offset + _SLOT.size : offset + _SLOT.size + len(ids)] = ids
        _SLOT.pack_into(self._memory, offset, number, len(ids))


def read_board(path: Path) -> BoardState | None:
    """What the board says; None without one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _HEADER.size:
        return None
    pid, num_completed, busy_since, num_places = _HEADER.unpack_from(content)
    slot_bytes = (len(content) - _HEADER.size) // _NUM_SLOTS
    request_ids: set[str] = set()
    for slot in range(_NUM_SLOTS):
        offset = _HEADER.size + slot * slot_bytes
        number, num_bytes = _SLOT.unpack_from(content, offset)
        if number > num_completed and num_bytes:
            ids = content[offset + _SLOT.size : offset + _SLOT.size + num_bytes]
            request_ids.update(ids.decode(errors="replace").split(_SEPARATOR.decode()))
    return BoardState(
        pid=pid,
        num_completed=num_completed,
        request_ids=frozenset(request_ids),
        busy_seconds=(time.monotonic_ns() - busy_since) / 1e9 if busy_since else 0.0,
        num_places=num_places,
    )


def read_num_places(path: Path) -> int | None:
    """``BoardState.num_places`` alone, in a few microseconds."""
    try:
        with path.open("rb", buffering=0) as file:
            header = file.read(_HEADER.size)
    except FileNotFoundError:
        return None
    return int(_HEADER.unpack(header)[_PLACES]) if len(header) == _HEADER.size else None
