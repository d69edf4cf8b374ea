"""AdapterSlots: which adapter lies in which slot of the device, and who uses it. Moves nothing itself.

A slot whose adapter no running sequence takes keeps it until another needs the slot: the least recently used goes
first, a pinned one last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .adapter import Adapter


@dataclass(frozen=True)
class SlotLoad:
    """Put ``adapter`` into ``slot`` before the step that is being scheduled."""

    slot: int
    adapter: Adapter


class AdapterSlots:
    """``want`` is called with adapters that are needed next, where some of them are not in host memory."""

    def __init__(self, num_slots: int, want: Callable[[Sequence[Adapter]], None]) -> None:
        self.num_slots = num_slots
        self.num_loads = 0
        self._want = want
        self._adapters: list[Adapter | None] = [None] * num_slots
        self._users = [0] * num_slots
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        """Slots without a running user, the least recently used first."""
        self._loads: list[SlotLoad] = []

    @property
    def num_used(self) -> int:
        """Slots that hold an adapter, whether or not a running sequence takes it."""
        return sum(adapter is not None for adapter in self._adapters)

    def ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether all are on the device or in host memory. Asks for what is not."""
        if all(adapter.slot is not None or adapter.weights is not None for adapter in adapters):
            return True
        self._want(adapters)
        return False

    def fits(self, adapters: Sequence[Adapter]) -> bool:
        """Whether ``acquire`` may be called now, for adapters that are ready."""
        held = [adapter.slot for adapter in adapters if adapter.slot is not None]
        available = sum(slot not in held for slot in self._idle)
        return len(adapters) - len(held) <= available

    def acquire(self, adapters: Sequence[Adapter]) -> None:
        """One more running sequence takes these."""
        for adapter in adapters:
            if adapter.slot is not None:
                self._hold(adapter.slot)
        for adapter in adapters:
            if adapter.slot is None:
                self._place(adapter)

    def release(self, adapters: Sequence[Adapter]) -> None:
        """One running sequence less takes these."""
        for adapter in adapters:
            assert adapter.slot is not None
            self._users[adapter.slot] -= 1
            if not self._users[adapter.slot]:
                self._idle[adapter.slot] = None

    def take_loads(self) -> tuple[SlotLoad, ...]:
        """What must be in place before the next step; to be called once a step."""
        loads, self._loads = tuple(self._loads), []
        return loads

    def drop(self, adapter: Adapter) -> None:
        """``adapter`` has no users any more and will have none: its slot is the first to be given away."""
        if adapter.slot is None:
            return
        assert not self._users[adapter.slot]
        self._adapters[adapter.slot] = None
        self._idle.move_to_end(adapter.slot, last=False)
        adapter.slot = None

    def check_integrity(self, running: Sequence[Sequence[Adapter]]) -> None:
        """Raise AssertionError unless slots are held for exactly these: the adapters of each running sequence."""
        users = [0] * self.num_slots
        for adapters in running:
            for adapter in adapters:
                assert adapter.slot is not None and self._adapters[adapter.slot] is adapter, f"{adapter.name}: no slot"
                users[adapter.slot] += 1
        assert users == self._users, "users of slots disagree with the running sequences"
        assert {slot for slot in range(self.num_slots) if not users[slot]} == set(self._idle)
        assert all(adapter is None or adapter.slot == slot for slot, adapter in enumerate(self._adapters))

    def _hold(self, slot: int) -> None:
        self._idle.pop(slot, None)
        self._users[slot] += 1

    def _place(self, adapter: Adapter) -> None:
        slot = min(self._idle, key=self._worth)  # the first of equal ones, which is the least recently used
        evicted = self._adapters[slot]
        if evicted is not None:
            evicted.slot = None
        self._adapters[slot], adapter.slot = adapter, slot
        self._loads.append(SlotLoad(slot, adapter))
        self.num_loads += 1
        self._hold(slot)

    def _worth(self, slot: int) -> int:
        adapter = self._adapters[slot]
        return 0 if adapter is None else 2 if adapter.pinned else 1
