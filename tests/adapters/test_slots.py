"""Slots of the device and host memory: who is placed, kept and dropped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trident_llm.adapters.adapter import Adapter
from trident_llm.adapters.adapter_file import AdapterWeights
from trident_llm.adapters.host_memory import HostMemory
from trident_llm.adapters.slots import AdapterSlots, SlotLoad

WEIGHTS = AdapterWeights(updates=(), modules=frozenset(), rank=1, uses_dora=False)


def make(name: str, *, pinned: bool = False, loaded: bool = True) -> Adapter:
    return Adapter(
        name=name, generation=ord(name), source="", digest="", folder=Path(), rank=1, num_modules=0, num_bytes=0,
        uses_dora=False, pinned=pinned, weights=WEIGHTS if loaded else None,
    )  # fmt: skip


def run_once(slots: AdapterSlots, *adapters: Adapter) -> tuple[SlotLoad, ...]:
    assert slots.ready(adapters) and slots.fits(adapters)
    slots.acquire(adapters)
    slots.release(adapters)
    return slots.take_loads()


def test_the_least_recently_used_slot_is_given_away() -> None:
    slots = AdapterSlots(2, lambda adapters: None)
    a, b, c = map(make, "abc")
    assert run_once(slots, a) == (SlotLoad(0, a),)
    assert run_once(slots, b) == (SlotLoad(1, b),)
    assert run_once(slots, a) == ()
    assert run_once(slots, c) == (SlotLoad(1, c),)
    assert (a.slot, b.slot, c.slot) == (0, None, 1)
    assert slots.num_loads == 3
    slots.check_integrity([])


def test_a_pinned_adapter_is_the_last_to_go() -> None:
    slots = AdapterSlots(2, lambda adapters: None)
    pinned, b, c, d = make("p", pinned=True), *map(make, "bcd")
    for adapter in (pinned, b, c):
        run_once(slots, adapter)
    assert pinned.slot == 0
    slots.acquire([c, d])
    assert pinned.slot is None, "two slots are needed at once"
    slots.check_integrity([[c, d]])


def test_slots_of_running_sequences_are_not_given_away() -> None:
    slots = AdapterSlots(2, lambda adapters: None)
    a, b, c = map(make, "abc")
    slots.acquire([a])
    slots.acquire([a, b])
    assert not slots.fits([c]) and not slots.fits([b, c])
    assert slots.fits([a, b])
    slots.release([a, b])
    assert slots.fits([c]) and not slots.fits([b, c])
    slots.acquire([c])
    slots.check_integrity([[a], [c]])
    assert b.slot is None


def test_a_dropped_adapter_leaves_its_slot_first() -> None:
    slots = AdapterSlots(3, lambda adapters: None)
    a, b, c, d = map(make, "abcd")
    for adapter in (a, b, c):
        run_once(slots, adapter)
    slots.drop(c)
    slots.drop(d)
    assert run_once(slots, d) == (SlotLoad(2, d),)


def test_adapters_that_are_nowhere_are_asked_for() -> None:
    wanted: list[Adapter] = []
    slots = AdapterSlots(1, wanted.extend)
    a = make("a", loaded=False)
    assert not slots.ready([a]) and wanted == [a]
    a.weights = WEIGHTS
    run_once(slots, a)
    a.weights = None
    assert slots.ready([a]), "the device has it"


@pytest.fixture
def host() -> Iterator[HostMemory]:
    def read(adapter: Adapter) -> AdapterWeights:
        if adapter.name == "x":
            raise OSError("no such file")
        return WEIGHTS

    memory = HostMemory(2, read)
    yield memory
    memory.close()


def poll(host: HostMemory) -> list[tuple[Adapter, BaseException]]:
    failed = []
    deadline = time.monotonic() + 10
    while host.is_reading and time.monotonic() < deadline:
        failed += host.poll()
        time.sleep(0.001)
    return failed


def test_host_memory_drops_the_least_recently_used_and_reads_it_again(host: HostMemory) -> None:
    a, b, c = (make(name, loaded=False) for name in "abc")
    pinned = make("p", pinned=True, loaded=False)
    for adapter in (a, b):
        host.put(adapter, WEIGHTS)
    host.touch(a)
    host.put(c, WEIGHTS)
    assert [adapter.weights is not None for adapter in (a, b, c)] == [True, False, True]
    host.want([b])
    assert poll(host) == [] and host.num_reads == 1
    assert [adapter.weights is not None for adapter in (a, b, c)] == [False, True, True]
    host.touch(b)
    host.put(pinned, WEIGHTS)
    host.put(a, WEIGHTS)
    assert pinned.weights is not None


def test_all_of_a_blend_come_together(host: HostMemory) -> None:
    a, b, c = (make(name, loaded=False) for name in "abc")
    host.want([a, b])
    host.want([c])  # later: another blend would drop what this one has
    poll(host)
    assert a.weights is not None and b.weights is not None and c.weights is None
    host.want([c])
    poll(host)
    assert c.weights is not None


def test_what_cannot_be_read_is_reported_and_holds_up_nobody(host: HostMemory) -> None:
    x, a = make("x", loaded=False), make("a", loaded=False)
    host.want([x])
    ((failed, error),) = poll(host)
    assert failed is x and isinstance(error, OSError)
    host.want([a])
    assert poll(host) == [] and a.weights is not None
