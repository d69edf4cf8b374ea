"""Which loads of a model there are in one server: one that is loaded while it is loaded has two sets of doors for a
while, and the server tells the first set nothing before its last request has ended.

Each load has a number, larger than those before it, and its doors show themselves in a folder. Knows neither requests
nor the server's API.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..run_directory import RunDirectory

UNKNOWN = 0
"""The number of a load whose begin nobody has seen: nothing follows from it."""
_BEGUN = "begun"
"""The file with the number of the load that has begun last."""
_DOOR, _UNLOADED = ".door", ".unloaded"


def num_instances(model_config: Mapping[str, Any]) -> int:
    """Doors of a load with this config; 0 when all of them being there does not mean that the load succeeds."""
    policy = model_config.get("version_policy") or {"latest": {"num_versions": 1}}
    latest, specific = policy.get("latest") or {}, policy.get("specific") or {}
    num_versions = int(latest.get("num_versions", 0)) + len(specific.get("versions", ()))
    if num_versions != 1 or model_config.get("model_warmup"):
        return 0
    groups = model_config.get("instance_group", ())
    return sum(int(group["count"]) * max(1, len(group.get("gpus", ()))) for group in groups)


class ModelLoad:
    """The load that one door belongs to. Its files go with the engine, other loads' do too."""

    def __init__(self, run_directory: RunDirectory, model: str, version: str) -> None:
        """To be made when the door begins to load, before another load of the model can begin."""
        self._folder = _folder(run_directory, model, version)
        self._number = _last_begun(self._folder)
        self._own_file: Path | None = None

    @staticmethod
    def begin(run_directory: RunDirectory, model: str, version: str) -> None:
        """Doors that are made from now on are of a new load. Raises ``LoadFailed`` as ``RunDirectory.create``."""
        run_directory.create()
        folder = _folder(run_directory, model, version)
        temporary = folder / f".{_BEGUN}.{os.getpid()}"
        # By the clock, because the last number goes with the engine; above it, because a reboot sets the clock back.
        number = max(_last_begun(folder) + 1, time.monotonic_ns())
        # An engine that ends just now takes the folder with it.
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(str(number))
            temporary.replace(folder / _BEGUN)

    def show(self, num_doors: int) -> None:
        """This door is ready; its load has ``num_doors`` (0: unknown)."""
        if self._number != UNKNOWN and num_doors:
            self._own_file = self._folder / f"{self._number}.{num_doors}.{os.getpid()}{_DOOR}"
            _touch(self._own_file)

    def leave(self) -> None:
        """This door ends."""
        if self._own_file is not None:
            self._own_file.unlink(missing_ok=True)

    @property
    def is_replaced(self) -> bool:
        """Whether all doors of a later load are there: it serves, and this one keeps the requests that it has."""
        if self._number == UNKNOWN:
            return False
        shown = [tuple(map(int, path.name.split(".")[:2])) for path in self._folder.glob(f"*{_DOOR}")]
        later = Counter((number, num_doors) for number, num_doors in shown if number > self._number)
        return any(count >= num_doors for (_, num_doors), count in later.items())

    @property
    def is_unloaded(self) -> bool:
        """Whether a door of this load has found that it is being unloaded."""
        return self._number != UNKNOWN and self._unloaded_file.exists()

    def mark_unloaded(self) -> None:
        """Tell the other doors of this load that it is being unloaded."""
        if self._number != UNKNOWN:
            _touch(self._unloaded_file)

    @property
    def _unloaded_file(self) -> Path:
        return self._folder / f"{self._number}{_UNLOADED}"


def _folder(run_directory: RunDirectory, model: str, version: str) -> Path:
    return run_directory.path / "loads" / quote(f"{model}-{version}", safe="")


def _last_begun(folder: Path) -> int:
    try:
        return int((folder / _BEGUN).read_text())
    except (OSError, ValueError):
        return UNKNOWN


def _touch(path: Path) -> None:
    """Unless its folder is gone, with the engine."""
    with contextlib.suppress(FileNotFoundError):
        path.touch(mode=0o600)
