"""MixStore: X-LoRA mixes by name. A mix comes with its members, which are adapters by name too, and goes with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadRequest, LoadFailed, TridentError, known_error
from .adapter import Adapter
from .adapter_file import WEIGHTS_FILE, AdapterWeights, check_not_pickled
from .classifier import Classifier, read_classifier
from .journal import AdapterJournal, CopiedFiles, JournalEntry, files_digest
from .lora_config import CONFIG_FILE
from .mix import Mix
from .sources import copy_files
from .xlora_config import CLASSIFIER_FILE, XLORA_CONFIG_FILE, XLoraConfig, member_folder, read_xlora_config

if TYPE_CHECKING:
    from .store import AdapterStore

logger = logging.getLogger(__name__)

_MEMBER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


@dataclass(frozen=True)
class _Files:
    """A mix as it has been read."""

    config: XLoraConfig
    classifier: Classifier
    members: tuple[AdapterWeights, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True)
class _PendingLoad:
    name: str
    source: str
    copied: CopiedFiles
    read: Future[_Files]
    reply: Future[dict[str, Any]]


class MixStore:
    """Part of an ``AdapterStore``, and like it for the engine's thread."""

    def __init__(self, store: AdapterStore, journal: AdapterJournal) -> None:
        self._store = store
        self._journal = journal
        self._names: dict[str, Mix] = {}
        self._all: dict[int, Mix] = {}
        """By generation: those with a name, and those whose last users still run."""
        self._pending: list[_PendingLoad] = []

    @property
    def is_busy(self) -> bool:
        return bool(self._pending)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def live_names(self) -> list[str]:
        """Also of those that only still run."""
        return [mix.name for mix in self._all.values()]

    def has(self, name: str) -> bool:
        return name in self._names

    def find(self, name: str, generation: int | None = None) -> Mix | None:
        """The mix that has this name now, or that is this generation."""
        mix = self._names.get(name) if generation is None else self._all.get(generation)
        return mix if mix is not None and mix.name == name else None

    def load(self, name: str, find: Callable[[str], Path], source: str) -> Future[dict[str, Any]]:
        """Begin to load a mix and its members; see ``AdapterStore.load``."""
        what = f"mix {name!r}"
        copied = self._journal.new_generation()

        def read() -> _Files:
            _copy(find(what), copied.folder, what)
            return self._read(copied.folder, what)

        reply: Future[dict[str, Any]] = Future()
        self._pending.append(_PendingLoad(name, source, copied, self._store.submit(read), reply))
        return reply

    def unload(self, name: str) -> dict[str, Any]:
        """Take away the names of a mix and its members; what runs with them goes on."""
        mix = self._names.pop(name)
        for member in mix.members:
            self._store.take_name(member)
        self._store.record()
        users = sum(member.num_users - 1 for member in mix.members)
        self._free_unused()
        return {"name": name, "generation": mix.generation, "users": users}

    def describe(self) -> list[dict[str, object]]:
        return [mix.describe() for mix in self._names.values()]

    def poll(self) -> None:
        """Take over what has been read, and let go of what nobody uses any more."""
        while self._pending and self._pending[0].read.done():
            load = self._pending.pop(0)
            try:
                load.reply.set_result(self._finish(load).describe())
            except Exception as error:
                self._journal.remove(load.copied.generation)
                load.reply.set_exception(known_error(error, LoadFailed, f"mix {load.name!r}: "))
        self._free_unused()

    def entries(self) -> list[JournalEntry]:
        return [
            JournalEntry(
                name=mix.name, generation=mix.generation, source=mix.source, current=self._names.get(mix.name) is mix,
                members=tuple(member.generation for member in mix.members),
            )
            for mix in self._all.values()
        ]  # fmt: skip

    def holds(self) -> list[Sequence[Adapter]]:
        """The members of every mix, which has each as its user."""
        return [mix.members for mix in self._all.values()]

    def restore(self, entry: JournalEntry) -> None:
        """Bring back what an engine before this one had. What no request names is let go by the next ``poll``."""
        copied = CopiedFiles(entry.generation, self._journal.folder_of(entry.generation))
        try:
            files = self._read(copied.folder, f"mix {entry.name!r}")
        except TridentError:
            logger.exception("mix %r, generation %d, is lost", entry.name, entry.generation)
            return
        mix = self._new_mix(entry.name, entry.source, copied, files, list(entry.members))
        if entry.current:
            self._give_names(mix)
        else:
            self._store.keep_for_a_while(mix.members)

    def _finish(self, load: _PendingLoad) -> Mix:
        files = load.read.result()
        if self._store.named(load.name) is not None:
            raise BadRequest(f"mix {load.name!r}: an adapter has this name; unload it first")
        for name in files.config.adapters:
            taken = self._store.named(name)
            if name in self._names or (taken is not None and taken.mix != load.name):
                raise BadRequest(f"mix {load.name!r}: the name of its member {name!r} is taken; unload that first")
        generations = [self._journal.new_number() for _ in files.members]
        mix = self._new_mix(load.name, load.source, load.copied, files, generations)
        self._give_names(mix)
        return mix

    def _new_mix(self, name: str, source: str, copied: CopiedFiles, files: _Files, generations: list[int]) -> Mix:
        members = []
        for member, weights, digest, generation in zip(
            files.config.adapters, files.members, files.digests, generations, strict=True
        ):
            folder = CopiedFiles(generation, copied.folder / "adapters" / member)
            members.append(self._store.add(member, folder, f"{source}:{member}", digest, weights, mix=name))
        self._store.retain(members)
        mix = Mix(
            name=name, generation=copied.generation, source=source, folder=copied.folder, config=files.config,
            classifier=files.classifier, members=tuple(members),
        )  # fmt: skip
        self._all[mix.generation] = mix
        return mix

    def _give_names(self, mix: Mix) -> None:
        replaced = self._names.pop(mix.name, None)
        self._names[mix.name] = mix
        for member in replaced.members if replaced else ():
            self._store.take_name(member)
        for member in mix.members:
            self._store.give_name(member)

    def _free_unused(self) -> None:
        for mix in list(self._all.values()):
            if self._names.get(mix.name) is not mix and not mix.is_used:
                del self._all[mix.generation]
                self._store.release(mix.members)
                self._store.record()
                self._journal.remove(mix.generation)

    def _read(self, folder: Path, what: str) -> _Files:
        """Read and check everything; from any thread."""
        store, config = self._store, read_xlora_config(folder, what)
        if len(config.adapters) > store.slots.num_slots:
            raise BadRequest(f"{what}: {len(config.adapters)} members do not fit max_loras ({store.slots.num_slots})")
        hidden_size = next(iter(store.target.linears)).num_inputs
        if config.hidden_size != hidden_size:
            raise BadRequest(f"{what}: hidden_size is {config.hidden_size}; the base model's is {hidden_size}")
        folders = [folder / "adapters" / name for name in config.adapters]
        members = tuple(
            store.read(path, f"{what}, member {name!r}") for path, name in zip(folders, config.adapters, strict=True)
        )
        if any(weights.uses_dora for weights in members):
            raise BadRequest(f"{what}: DoRA members are not supported: a scaling is not linear in them")
        updated = [name for name in store.device.targets if any(name in weights.modules for weights in members)]
        classifier = read_classifier(
            folder, config, what, modules=store.device.targets, updated=updated, dtype=store.target.dtype,
            device=store.target.device,
        )  # fmt: skip
        return _Files(config, classifier, members, tuple(files_digest(path, _MEMBER_FILES) for path in folders))


def _copy(source: Path, destination: Path, what: str) -> None:
    copy_files(source, destination, (XLORA_CONFIG_FILE, CLASSIFIER_FILE, CONFIG_FILE, WEIGHTS_FILE), what)
    for name in read_xlora_config(destination, what).adapters:
        folder = member_folder(source, name, what)
        check_not_pickled(folder, f"{what}, member {name!r}")
        copy_files(folder, destination / "adapters" / name, _MEMBER_FILES, what)
