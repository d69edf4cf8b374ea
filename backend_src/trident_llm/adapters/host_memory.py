"""HostMemory: which adapters' weights lie in host memory, and the thread that reads files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .adapter import Adapter
from .adapter_file import AdapterWeights

T = TypeVar("T")


class HostMemory:
    """At most ``capacity`` adapters, the least recently used dropped first, pinned ones last.

    One set of adapters is wanted at a time and never dropped while it is, so that a blend gets all it needs. One thread
    reads, so that what is asked for first is there first; ``poll`` takes over what it has read.
    """

    def __init__(self, capacity: int, read: Callable[[Adapter], AdapterWeights]) -> None:
        self.num_reads = 0
        self._capacity = capacity
        self._read = read
        self._held: OrderedDict[Adapter, None] = OrderedDict()
        self._wanted: tuple[Adapter, ...] = ()
        self._reading: dict[Adapter, Future[AdapterWeights]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._reached_pause = threading.Event()
        self._pause_ended = threading.Event()

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Have the thread do something else."""
        return self._thread.submit(function)

    def pause(self) -> None:
        """Have the thread finish what it was asked for so far, and do nothing after that until ``resume``."""

        def wait() -> None:
            self._reached_pause.set()
            self._pause_ended.wait()

        self._reached_pause.clear()
        self._pause_ended.clear()
        self._thread.submit(wait)

    @property
    def is_paused(self) -> bool:
        return self._reached_pause.is_set() and not self._pause_ended.is_set()

    def resume(self) -> None:
        self._pause_ended.set()

    def put(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Hold ``weights``, and drop another's if there are too many."""
        adapter.weights = weights
        self._held[adapter] = None
        self._held.move_to_end(adapter)
        while len(self._held) > self._capacity:
            droppable = [held for held in self._held if held not in self._wanted and held is not adapter]
            if not droppable:
                return
            self.drop(min(droppable, key=lambda held: held.pinned))

    def touch(self, adapter: Adapter) -> None:
        """It has just been copied to the device."""
        self.forget_wanted(adapter)
        if adapter in self._held:
            self._held.move_to_end(adapter)

    def drop(self, adapter: Adapter) -> None:
        self._held.pop(adapter, None)
        adapter.weights = None
        reading = self._reading.pop(adapter, None)
        if reading is not None:
            reading.cancel()

    def drop_all(self) -> None:
        """What is wanted is read again when it is asked for."""
        self._wanted = ()
        for adapter in list(self._held):
            self.drop(adapter)

    def want(self, adapters: Sequence[Adapter]) -> None:
        """Read what is missing of these, unless others are wanted already."""
        if self._wanted and any(adapter.weights is None and adapter.slot is None for adapter in self._wanted):
            return
        self._wanted = tuple(adapters)
        for adapter in adapters:
            if adapter.weights is None and adapter.slot is None and adapter not in self._reading:
                self._reading[adapter] = self._thread.submit(self._read, adapter)

    def forget_wanted(self, adapter: Adapter) -> None:
        """Nobody waits for it any more."""
        self._wanted = tuple(wanted for wanted in self._wanted if wanted is not adapter)

    def poll(self) -> list[tuple[Adapter, BaseException]]:
        """Take over what has been read; returns the adapters that could not be, with the reasons."""
        failed = []
        for adapter, reading in list(self._reading.items()):
            if not reading.done():
                continue
            del self._reading[adapter]
            error = reading.exception()
            if error is None:
                self.num_reads += 1
                self.put(adapter, reading.result())
            else:
                failed.append((adapter, error))
                self.forget_wanted(adapter)
        return failed

    def close(self) -> None:
        self.resume()
        self._thread.shutdown(wait=True, cancel_futures=True)
