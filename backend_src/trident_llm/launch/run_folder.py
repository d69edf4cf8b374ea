"""The private folder of one launch, and the removal of everything that belongs to it.

A folder is alive while its launcher holds the lock file inside. Its name also names the server's shared memory,
and every process of the launch carries its path in the environment: so whoever finds the folder can clear it all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import LoadFailed
from ..run_directory import RunDirectory

RUN_VARIABLE = "TRIDENT_RUN_DIR"
SHARED_MEMORY = Path("/dev/shm")
BACKEND_FOLDERS = Path("/tmp/python_env_*")
_NAME = "serve-"
_LONGEST_ENGINE_FOLDER = "4194304-llm"
"""What the doors put into the run folder: a folder named after the server's process and the engine's model."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one launch."""

    path: Path

    @property
    def shared_memory_prefix(self) -> str:
        """What the names of the server's regions in /dev/shm start with."""
        return f"trident-{self.path.name.removeprefix(_NAME)}-"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def backends(self) -> Path:
        return self.path / "backends"

    @property
    def log(self) -> Path:
        return self.path / "server.log"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def ready(self) -> Path:
        """A file that is there since the server was ready."""
        return self.path / "ready"

    def processes(self) -> list[psutil.Process]:
        """All processes of this launch but the calling one: the server, its stubs, the engine."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(RUN_VARIABLE) == str(self.path):
                    found.append(process)
        return found

    def clear(self, grace: float = 0.0) -> None:
        """End the launch's processes, then remove its shared memory and the folder itself.

        ``grace``: seconds the processes get to end by themselves before they are killed.
        """
        deadline = time.monotonic() + grace
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        while alive:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=1.0)
            alive = self.processes()
        for region in SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
        for folder in self._backend_folders():
            with contextlib.suppress(OSError):
                folder.rmdir()
        shutil.rmtree(self.path, ignore_errors=True)

    def _backend_folders(self) -> list[Path]:
        """The empty folders in /tmp that a Python backend makes while it starts, and leaves when it is killed.

        Nothing but the time tells whose they are; another server of this user that started at the same time
        does not miss an empty one.
        """
        if not self.lock.exists():
            return []
        until = self.ready.stat().st_mtime if self.ready.exists() else time.time()
        found = []
        for folder in BACKEND_FOLDERS.parent.glob(BACKEND_FOLDERS.name):
            with contextlib.suppress(OSError):
                status = folder.lstat()
                if status.st_uid == os.getuid() and self.lock.stat().st_mtime <= status.st_mtime <= until:
                    found.append(folder)
        return found


@contextlib.contextmanager
def new_run_folder(base: Path | None = None) -> Iterator[RunFolder]:
    """A fresh folder, locked for as long as the context lasts. Clearing it is the caller's business.

    Raises ``LoadFailed`` when its path is too long for the engine's socket inside.
    """
    parent = base or _base()
    name = f"{_NAME}{os.getpid()}-{secrets.token_hex(4)}"
    RunDirectory(parent / name / _LONGEST_ENGINE_FOLDER)
    hidden = parent / f".{name}"
    hidden.mkdir(mode=0o700)
    # Locked before it gets the name that remove_stale looks for, so it is never taken for a stale one.
    with (hidden / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield RunFolder(hidden.rename(parent / name))


def remove_stale(base: Path | None = None) -> list[RunFolder]:
    """Clear what launches left behind that ended without doing so themselves; returns their folders."""
    stale = []
    for path in sorted((base or _base()).glob(f"{_NAME}*")):
        run = RunFolder(path)
        if not _is_locked(run.lock):
            run.clear()
            stale.append(run)
    return stale


def _is_locked(lock: Path) -> bool:
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _base() -> Path:
    """The folder for all launches of this user. Raises ``LoadFailed`` if it is someone else's."""
    base = Path(os.environ.get(RUN_VARIABLE) or Path(tempfile.gettempdir()) / f"trident-{os.getuid()}")
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if base.is_symlink() or base.lstat().st_uid != os.getuid():
        raise LoadFailed(f"the run folder {str(base)!r} does not belong to this user; set {RUN_VARIABLE} to another")
    return base
