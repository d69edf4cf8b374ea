"""AdapterJournal: the engine's own copies of adapters, and which of them a restarted engine must have."""

from __future__ import annotations

import hashlib
import os
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path

import msgspec

_JOURNAL = "journal.json"


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One generation. Not ``current``: running requests alone use it, or mixes that still run."""

    name: str
    generation: int
    source: str
    pinned: bool = False
    current: bool
    members: tuple[int, ...] = ()
    """Generations of the members, where this is a mix: their files lie in its folder."""


class _Contents(msgspec.Struct, kw_only=True):
    next_generation: int = 1
    entries: list[JournalEntry] = []


@dataclass(frozen=True)
class CopiedFiles:
    generation: int
    folder: Path


class AdapterJournal:
    """``folder`` outlives an engine process, not the server. Everything is written before anybody relies on it."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        """Without ``keep`` the folder goes with this object: no engine will take its place."""
        self._folder = folder
        if not keep:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / _JOURNAL
        self._contents = msgspec.json.decode(path.read_bytes(), type=_Contents) if path.exists() else _Contents()
        self.is_new = not path.exists()
        """Whether no engine has been here before: the settings then say what to load."""
        kept = {f"{entry.generation}" for entry in self._contents.entries}
        for left in folder.iterdir():
            if left.is_dir() and left.name not in kept:
                shutil.rmtree(left)
        self._write()

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        return tuple(self._contents.entries)

    def new_number(self) -> int:
        """A generation never used before."""
        number = self._contents.next_generation
        self._contents.next_generation += 1
        self._write()
        return number

    def new_generation(self) -> CopiedFiles:
        """A number never used before, and an empty folder for its files."""
        generation = self.new_number()
        folder = self.folder_of(generation)
        folder.mkdir()
        return CopiedFiles(generation, folder)

    def folder_of(self, generation: int) -> Path:
        return self._folder / f"{generation}"

    def record(self, entries: list[JournalEntry]) -> None:
        """These are all there are."""
        self._contents.entries = entries
        self._write()

    def remove(self, generation: int) -> None:
        """Delete the files of a generation that ``record`` has left out."""
        shutil.rmtree(self.folder_of(generation), ignore_errors=True)

    def _write(self) -> None:
        temporary = self._folder / f"{_JOURNAL}.new"
        temporary.write_bytes(msgspec.json.encode(self._contents))
        os.replace(temporary, self._folder / _JOURNAL)


def files_digest(folder: Path, names: tuple[str, ...]) -> str:
    """Hash of the files' contents, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
