"""AdapterStore: adapters by name, and every generation that somebody still uses.

Files are copied, read and checked by a thread of their own; a name changes hands between two steps, in ``poll``. All
other methods are for the engine's thread too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadRequest, LoadFailed, NotFound, TridentError, known_error
from .adapter import Adapter, Blend, BlendTerm
from .adapter_file import WEIGHTS_FILE, AdapterTarget, AdapterWeights, check_not_pickled, read_adapter
from .device_slots import DeviceSlots
from .host_memory import HostMemory
from .journal import AdapterJournal, CopiedFiles, JournalEntry, files_digest
from .lora_config import CONFIG_FILE
from .mix_store import MixStore
from .slots import AdapterSlots, SlotLoad
from .sources import copy_files
from .spec import AdapterTerm, format_spec

T = TypeVar("T")
logger = logging.getLogger(__name__)

FILES = (CONFIG_FILE, WEIGHTS_FILE)
GRACE_SECONDS = 60.0
"""How long a restarted engine keeps an older generation for requests that began with it."""


@dataclass(frozen=True)
class _PendingLoad:
    name: str
    source: str
    pinned: bool
    copied: CopiedFiles
    read: Future[tuple[AdapterWeights, str]]
    reply: Future[dict[str, Any]]


class AdapterStore:
    """Owns the adapters of one model: names, generations, host memory, and slots of the device."""

    def __init__(
        self, target: AdapterTarget, journal: AdapterJournal, *, num_slots: int, max_in_host_memory: int
    ) -> None:
        self.device = DeviceSlots(
            target.linears, num_slots=num_slots, max_rank=target.max_rank, dtype=target.dtype, device=target.device
        )
        self._target = target
        self._journal = journal
        self._host = HostMemory(max_in_host_memory, self._read_again)
        self.slots = AdapterSlots(num_slots, self._host.want)
        self._names: dict[str, Adapter] = {}
        self._by_generation: dict[int, Adapter] = {}
        self._pending: list[_PendingLoad] = []
        self._graces: list[tuple[float, Adapter]] = []
        self._tell_names: Callable[[list[str]], None] = lambda names: None
        self.mixes = MixStore(self, journal)
        self._restore()

    @property
    def is_new(self) -> bool:
        """Whether the settings say what to load: no engine has been here before."""
        return self._journal.is_new

    @property
    def is_busy(self) -> bool:
        """Whether ``poll`` is about to have something to do."""
        return bool(self._pending) or self._host.is_reading or self.mixes.is_busy

    def load(
        self, name: str, find: Callable[[str], Path], source: str, *, pinned: bool = False
    ) -> Future[dict[str, Any]]:
        """Begin to load ``source``, whose folder ``find`` (called by the thread, with what errors begin with) returns.

        The result describes the adapter, from when on new requests get it. A failure changes nothing.
        """
        what = f"adapter {name!r}"
        copied = self._journal.new_generation()

        def read() -> tuple[AdapterWeights, str]:
            folder = find(what)
            check_not_pickled(folder, what)
            copy_files(folder, copied.folder, FILES, what)
            return self.read(copied.folder, what), files_digest(copied.folder, FILES)

        reply: Future[dict[str, Any]] = Future()
        self._pending.append(_PendingLoad(name, source, pinned, copied, self._host.submit(read), reply))
        return reply

    def unload(self, name: str) -> dict[str, Any]:
        """Take the name away at once; requests that run with it keep it to their end."""
        if self.mixes.has(name):
            return self.mixes.unload(name)
        adapter = self._names.pop(name, None)
        if adapter is None:
            raise NotFound(f"name: {self._unknown(name)}")
        self._retire(adapter)
        return {"name": name, "generation": adapter.generation, "users": adapter.num_users}

    def describe(self) -> list[dict[str, object]]:
        """All adapters that have a name, in the order they got it."""
        return [adapter.describe() for adapter in self._names.values()]

    def resolve(self, terms: Sequence[AdapterTerm]) -> Blend | None:
        """The blend that a request asks for; None where it comes to nothing. Raises ``NotFound`` or ``BadRequest``."""
        found = tuple(BlendTerm(self._find(term), term.weight) for term in terms)
        counted = tuple(term for term in found if term.weight)
        most = self.slots.num_slots
        if len(counted) > most:
            raise BadRequest(f"adapter: a blend of {len(counted)} adapters is not allowed; at most max_loras ({most})")
        named = [
            AdapterTerm(term.adapter.name, term.weight or 0.0, generation=term.adapter.generation) for term in counted
        ]
        return Blend(counted, format_spec(tuple(named))) if counted else None

    def keep_for_a_while(self, adapters: Iterable[Adapter]) -> None:
        """Older generations, for requests that began with them under an engine before this one."""
        for adapter in adapters:
            adapter.num_users += 1
            self._graces.append((time.monotonic() + GRACE_SECONDS, adapter))

    def retain(self, adapters: Iterable[Adapter]) -> None:
        """One more sequence takes these."""
        for adapter in adapters:
            adapter.num_users += 1

    def release(self, adapters: Iterable[Adapter]) -> None:
        """One sequence less takes these; a generation without a name and without users is gone."""
        for adapter in adapters:
            adapter.num_users -= 1
            self._retire(adapter, record=False)

    def apply(self, loads: Sequence[SlotLoad]) -> None:
        """Bring the device's slots up to date, before the next step."""
        self.device.apply(loads)
        for load in loads:
            self._host.touch(load.adapter)

    def poll(self) -> list[tuple[Adapter, TridentError]]:
        """Take over what the thread has finished; returns adapters that are lost, with the reasons."""
        while self._pending and self._pending[0].read.done():
            self._finish(self._pending.pop(0))
        now = time.monotonic()
        while self._graces and self._graces[0][0] <= now:
            self.release([self._graces.pop(0)[1]])
        self.mixes.poll()
        return [
            (adapter, LoadFailed(f"adapter {adapter.name!r}: its files are lost: {error}"))
            for adapter, error in self._host.poll()
        ]

    def wait(self, reply: Future[dict[str, Any]]) -> dict[str, Any]:
        """The result of a load, at the start, when nothing else goes on."""
        while not reply.done():
            self.poll()
            time.sleep(0.002)
        return reply.result()

    def follow_names(self, tell: Callable[[list[str]], None]) -> None:
        """Call ``tell`` now and with every change: names of mixes and adapters, also of those that only still run."""
        self._tell_names = tell
        self._tell_names(self._live_names())

    def stats(self) -> dict[str, int]:
        return {
            "adapters_loaded": len(self._names),
            "mixes_loaded": len(self.mixes.names),
            "adapter_slots_total": self.slots.num_slots,
            "adapter_slots_used": self.slots.num_used,
            "adapter_slot_loads_total": self.slots.num_loads,
            "adapter_reads_total": self._host.num_reads,
        }

    def check_integrity(self, live: Sequence[Sequence[Adapter]]) -> None:
        """Raise AssertionError unless the users are ``live``: the adapters of every unfinished sequence."""
        users = {adapter: 0 for adapter in self._by_generation.values()}
        for adapters in (*live, *self.mixes.holds(), tuple(adapter for _, adapter in self._graces)):
            for adapter in adapters:
                users[adapter] += 1
        for adapter, count in users.items():
            assert adapter.num_users == count, f"{adapter.name}: {adapter.num_users} users, not {count}"
            assert count or self._names.get(adapter.name) is adapter, f"{adapter.name}: kept for nobody"

    @property
    def target(self) -> AdapterTarget:
        return self._target

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Have the thread that reads files do something."""
        return self._host.submit(function)

    def pause(self) -> None:
        """Have the thread finish what it has begun, and then leave the model's weights alone until ``resume``."""
        self._host.pause()

    @property
    def is_paused(self) -> bool:
        """``poll`` has then still to take over what was finished before."""
        return self._host.is_paused

    def resume(self) -> None:
        self._host.resume()

    def forget_weights(self) -> None:
        """The model's weights have changed, and adapters are scaled and, with DoRA, measured by these: each is read
        again from the engine's own copy when it is asked for. No sequence may be running."""
        for adapter in self._by_generation.values():
            self.slots.drop(adapter)
        self._host.drop_all()

    def close(self) -> None:
        """End the thread."""
        self._host.close()

    def _find(self, term: AdapterTerm) -> Adapter:
        if term.generation is None:
            adapter = self._names.get(term.name)
        else:
            adapter = self._by_generation.get(term.generation)
        if adapter is None or adapter.name != term.name:
            raise NotFound(f"adapter: {self._unknown(term.name)}")
        return adapter

    def _unknown(self, name: str) -> str:
        names = sorted([*self._names, *self.mixes.names])
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        return f"{name[:200]!r} is not loaded; loaded: {shown or 'none'}"

    def _finish(self, load: _PendingLoad) -> None:
        try:
            weights, digest = load.read.result()
        except Exception as error:
            self._journal.remove(load.copied.generation)
            load.reply.set_exception(known_error(error, LoadFailed, f"adapter {load.name!r}: "))
            return
        if self.mixes.has(load.name):
            self._journal.remove(load.copied.generation)
            load.reply.set_exception(BadRequest(f"adapter {load.name!r}: a mix has this name; unload it first"))
            return
        adapter = self.add(load.name, load.copied, load.source, digest, weights, pinned=load.pinned)
        self.give_name(adapter)
        load.reply.set_result(adapter.describe())

    def named(self, name: str) -> Adapter | None:
        return self._names.get(name)

    def give_name(self, adapter: Adapter) -> None:
        """From now on requests for its name get ``adapter``."""
        replaced = self._names.pop(adapter.name, None)
        self._names[adapter.name] = adapter
        self.record()
        if replaced is not None:
            self._retire(replaced)

    def take_name(self, adapter: Adapter) -> None:
        """Its name is no longer its own, if it was."""
        if self._names.get(adapter.name) is adapter:
            del self._names[adapter.name]

    def add(
        self,
        name: str,
        copied: CopiedFiles,
        source: str,
        digest: str,
        weights: AdapterWeights,
        *,
        pinned: bool = False,
        mix: str = "",
    ) -> Adapter:
        """An adapter without a name yet."""
        adapter = Adapter(
            name=name, generation=copied.generation, source=source, digest=digest, folder=copied.folder,
            rank=weights.rank, num_modules=len(weights.modules), num_bytes=weights.num_bytes,
            uses_dora=weights.uses_dora, pinned=pinned, mix=mix,
        )  # fmt: skip
        self._by_generation[adapter.generation] = adapter
        self._host.put(adapter, weights)
        return adapter

    def _retire(self, adapter: Adapter, *, record: bool = True) -> None:
        """Let go of ``adapter`` if it has neither name nor users."""
        if self._names.get(adapter.name) is adapter:
            return
        gone = not adapter.num_users and self._by_generation.pop(adapter.generation, None) is not None
        if gone or record:
            self.record()
        if gone:
            self.slots.drop(adapter)
            self._host.forget_wanted(adapter)
            self._host.drop(adapter)
            self._journal.remove(adapter.generation)

    def record(self) -> None:
        """Write down what an engine that takes over must have."""
        entries = [
            JournalEntry(
                name=adapter.name, generation=adapter.generation, source=adapter.source, pinned=adapter.pinned,
                current=self._names.get(adapter.name) is adapter,
            )
            for adapter in self._by_generation.values()
            if not adapter.mix
        ]  # fmt: skip
        self._journal.record(entries + self.mixes.entries())
        self._tell_names(self._live_names())

    def _live_names(self) -> list[str]:
        return [*self.mixes.live_names(), *(adapter.name for adapter in self._by_generation.values())]

    def _read_again(self, adapter: Adapter) -> AdapterWeights:
        return self.read(adapter.folder, f"adapter {adapter.name!r}")

    def read(self, folder: Path, what: str) -> AdapterWeights:
        """Read and check the files in ``folder``; from any thread."""
        weights = read_adapter(folder, what, self._target)
        return weights.pinned() if self._target.device.type == "cuda" else weights

    def _restore(self) -> None:
        """Bring back what an engine before this one had."""
        for entry in self._journal.entries:
            if entry.members:
                self.mixes.restore(entry)
                continue
            what = f"adapter {entry.name!r}"
            copied = CopiedFiles(entry.generation, self._journal.folder_of(entry.generation))
            try:
                weights = self.read(copied.folder, what)
            except TridentError:
                logger.exception("%s, generation %d, is lost", what, entry.generation)
                continue
            digest = files_digest(copied.folder, FILES)
            adapter = self.add(entry.name, copied, entry.source, digest, weights, pinned=entry.pinned)
            if entry.current:
                self._names[entry.name] = adapter
            else:
                self.keep_for_a_while([adapter])
