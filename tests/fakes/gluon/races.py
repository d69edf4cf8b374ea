"""Shared memory whose uses must be ordered by barriers: a use that nothing orders is found in whatever order it runs.

Everyone has a clock, a vector clock: how far it knows roles and barriers to have come (Lamport 1978; Fidge and Mattern
1988). A role's own time goes on when it arrives at a barrier; a barrier's is the number of its phases that are over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

Clock: TypeAlias = "dict[object, int]"


class Race(AssertionError):
    """Two accesses to shared memory that nothing orders."""


def learn(clock: Clock, other: Clock) -> None:
    """Let ``clock`` know what ``other`` knows."""
    for who, time in other.items():
        if clock.get(who, 0) < time:
            clock[who] = time


@dataclass
class _Part:
    """What has been done with elements ``start`` to ``end`` - 1 together."""

    start: int
    end: int
    copied: tuple[object, int] | None = None
    """The barrier and the number of its phase with which the last copy is there."""
    uses: Clock = field(default_factory=dict)
    """By role since then: its time."""


class Memory:
    """One allocation. Groups of warps may write the same to the same place: stores are ordered with copies, and with
    what others have read before, but not with what others read next."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._parts: dict[tuple[int, int], _Part] = {}

    def check_copied(self, region: Region, clock: Clock, name: str) -> None:
        for part in self._over(region):
            if part.copied is not None and clock.get(part.copied[0], 0) < part.copied[1]:
                raise Race(f"{name} does not wait for a copy")

    def check_unused(self, region: Region, clock: Clock, name: str) -> None:
        for part in self._over(region):
            if any(clock.get(role, 0) < time for role, time in part.uses.items()):
                raise Race(f"{name} overwrites what has not been released")

    def use(self, region: Region, role: object, time: int) -> None:
        self._part(region).uses[role] = time

    def copy(self, region: Region, barrier: object, phase: int) -> None:
        part = self._part(region)
        part.copied = barrier, phase
        part.uses.clear()

    def _part(self, region: Region) -> _Part:
        place = region.start, region.end
        return self._parts.setdefault(place, _Part(*place))

    def _over(self, region: Region) -> list[_Part]:
        return [part for part in self._parts.values() if part.start < region.end and region.start < part.end]


@dataclass(frozen=True, eq=False)
class Region:
    """Elements ``start`` to ``end`` - 1 of one allocation."""

    memory: Memory
    start: int
    end: int

    @property
    def values(self) -> Tensor:
        return self.memory.values[self.start : self.end]

    def overlaps(self, other: Region) -> bool:
        return self.memory is other.memory and self.start < other.end and other.start < self.end
