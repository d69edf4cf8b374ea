"""The private folder in which one engine and its doors meet: launch settings, status, socket and locks.

One folder per (server process, engine name). Knows neither the server's API nor the engine's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from .deaths import Deaths
from .errors import LoadFailed

T = TypeVar("T")

GAVE_UP = 0
"""The pid in a ``failed`` status when no engine process wrote it."""
MAX_SOCKET_PATH = 107
"""Bytes that fit into ``sockaddr_un.sun_path`` on Linux, without its closing zero."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How to start the engine: its settings, and the command that runs it."""

    parameters: dict[str, str]
    command: list[str]


class Requantized(msgspec.Struct, frozen=True, kw_only=True):
    """Weights that an engine has been given while it served: one that takes its place must have them."""

    settings: dict[str, str]
    """All settings of quantization; they win over those of the launch."""
    samples_digest: str
    """Of the text they were calibrated on; empty without one."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine process stands. ``failed`` carries the error's text, starting with its code."""

    state: Literal["loading", "ready", "failed"]
    pid: int
    progress: str = ""
    error: str = ""
    written_at: float = msgspec.field(default_factory=time.time)
    """Seconds since the epoch."""


class RunDirectory:
    """Paths and small files of one engine's folder. All files are replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket_path = path / "engine.sock"
        self.watch_lock_path = path / "engine.lock"
        self.owners_lock_path = path / "owners.lock"
        self.board_path = path / "steps.bin"
        self.doors_path = path / "doors"
        self._launch_path = path / "engine.json"
        self._status_path = path / "status.json"
        self._deaths_path = path / "deaths.json"
        self._requantized_path = path / "requantized.json"
        self._published_path = path / "published.json"
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH:
            raise LoadFailed(
                f"the socket path {str(self.socket_path)!r} is longer than {MAX_SOCKET_PATH} bytes; "
                "set TRIDENT_RUN_DIR to a folder with a shorter name"
            )

    @classmethod
    def of(cls, server_pid: int, engine_name: str) -> RunDirectory:
        """The folder of the engine ``engine_name`` of the server process ``server_pid``; it need not exist."""
        return cls(_parent_folder() / f"{server_pid}-{engine_name}")

    @property
    def address(self) -> str:
        return f"ipc://{self.socket_path}"

    def create(self) -> None:
        """Make the folder, readable by this user alone. Raises ``LoadFailed`` if the parent is not ours."""
        parent = self.path.parent
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = parent.lstat()
        if parent.is_symlink() or owner.st_uid != os.getuid():
            raise LoadFailed(f"the run folder {str(parent)!r} does not belong to this user; set TRIDENT_RUN_DIR")
        self.path.mkdir(mode=0o700, exist_ok=True)

    def exists(self) -> bool:
        return self._launch_path.exists()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def write_launch(self, launch: Launch) -> None:
        _replace(self._launch_path, msgspec.json.encode(launch))

    def read_launch(self) -> Launch | None:
        return _read(self._launch_path, Launch)

    def write_requantized(self, requantized: Requantized) -> None:
        _replace(self._requantized_path, msgspec.json.encode(requantized))

    def read_requantized(self) -> Requantized | None:
        return _read(self._requantized_path, Requantized)

    def forget_requantized(self) -> None:
        """From now on the launch's settings hold."""
        self._requantized_path.unlink(missing_ok=True)

    def write_status(self, status: EngineStatus) -> None:
        _replace(self._status_path, msgspec.json.encode(status))

    def read_status(self) -> EngineStatus | None:
        return _read(self._status_path, EngineStatus)

    def clear_status(self) -> None:
        self._status_path.unlink(missing_ok=True)

    def is_final(self, status: EngineStatus) -> bool:
        """Whether ``status`` is a failure after which nothing is tried again: the engine could not be loaded in
        the first place, or it was restarted too often."""
        return status.state == "failed" and (status.pid == GAVE_UP or not self.read_deaths().total)

    def write_deaths(self, deaths: Deaths) -> None:
        """For the engine while it lives, and for the watch over it while it does not."""
        _replace(self._deaths_path, msgspec.json.encode(deaths))

    def read_deaths(self) -> Deaths:
        return _read(self._deaths_path, Deaths) or Deaths()

    def write_published(self, totals: dict[str, float]) -> None:
        """For the door that publishes metrics next: the totals that this one has reached."""
        _replace(self._published_path, msgspec.json.encode(totals))

    def take_published(self) -> dict[str, float]:
        """Read once: they are no use to who comes after that."""
        totals = _read(self._published_path, dict[str, float]) or {}
        self._published_path.unlink(missing_ok=True)
        return totals

    def remove_stale_siblings(self) -> None:
        """Delete folders of servers that are gone."""
        for folder in self.path.parent.glob("[0-9]*-*"):
            pid = folder.name.partition("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _parent_folder() -> Path:
    override = os.environ.get("TRIDENT_RUN_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"trident-{os.getuid()}"


def _replace(path: Path, content: bytes) -> None:
    """Write atomically: readers see the old content or the new. A folder that is gone is left alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except FileNotFoundError:
        return


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
