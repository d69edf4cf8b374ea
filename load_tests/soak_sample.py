"""What a soak measures of one server, its processes and shared memory, and what it concludes from a series of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from trident_llm.launch.run_folder import RUN_VARIABLE, SHARED_MEMORY, RunFolder

if TYPE_CHECKING:
    from served_model import ServedModel

FLAT = 0.02
"""How much memory of the doors or the engine may exceed that at the end of the warm-up, as a share of it."""
ABOVE_ECHO = 0.01
"""How much more the server's memory may grow than with an echo model, as a share."""
RSS = ("server", "doors", "engine")
COUNTS = ("server_threads", "threads", "descriptors", "sockets", "shared_memory")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a server without requests. Memory in MiB, of all processes of a kind together."""

    minutes: float
    """Since the load began."""
    server: float
    doors: float
    engine: float
    server_threads: int
    threads: int
    """Of doors and engine."""
    descriptors: int
    sockets: int
    shared_memory: int
    """Regions of this server in /dev/shm."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a soak must show."""

    name: str
    value: float
    limit: float
    """The largest value that passes."""

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


def take_sample(server: ServedModel, minutes: float) -> Sample:
    """Raises ``psutil.Error`` when the server has ended."""
    by_kind = server.processes()
    if not by_kind["server"]:
        raise psutil.Error("the Triton server has ended")
    everything = [process for processes in by_kind.values() for process in processes]
    memory = {kind: sum(_rss(process) for process in processes) for kind, processes in by_kind.items()}
    return Sample(
        minutes=minutes,
        **memory,
        server_threads=sum(process.num_threads() for process in by_kind["server"]),
        threads=sum(process.num_threads() for process in (*by_kind["doors"], *by_kind["engine"])),
        descriptors=sum(process.num_fds() for process in everything),
        sockets=sum(_num_sockets(process.pid) for process in everything),
        shared_memory=len(list(SHARED_MEMORY.glob(f"{_shared_memory_prefix(by_kind['server'][0])}*"))),
    )


def growth(samples: Sequence[Sample], warmup: float, name: str) -> float:
    """By what share the last value of ``name`` exceeds the first one after ``warmup`` minutes."""
    values = [getattr(sample, name) for sample in samples if sample.minutes >= warmup]
    return values[-1] / values[0] - 1 if values[0] else 0.0


def highest(samples: Sequence[Sample], warmup: float, name: str) -> float:
    """By what share the highest value of ``name`` exceeds the first one after ``warmup`` minutes."""
    values = [getattr(sample, name) for sample in samples if sample.minutes >= warmup]
    return max(values) / values[0] - 1 if values[0] else 0.0


def memory_checks(samples: Sequence[Sample], echo: Sequence[Sample], warmup: float) -> list[Check]:
    """``samples``: of the server with Trident, ``echo``: with an echo model, under the same load."""
    allowed = max(growth(echo, warmup, "server"), 0.0) + ABOVE_ECHO
    return [
        Check(name="server_growth", value=growth(samples, warmup, "server"), limit=allowed),
        Check(name="doors_highest", value=highest(samples, warmup, "doors"), limit=FLAT),
        Check(name="engine_highest", value=highest(samples, warmup, "engine"), limit=FLAT),
    ]


def count_checks(samples: Sequence[Sample], warmup: float) -> list[Check]:
    """Threads, descriptors, sockets and shared memory at the end: not above the highest of the warm-up."""
    first = next(index for index, sample in enumerate(samples) if sample.minutes >= warmup)
    return [
        Check(
            name=f"{name}_growth",
            value=getattr(samples[-1], name) - max(getattr(sample, name) for sample in samples[: first + 1]),
            limit=0,
        )
        for name in COUNTS
    ]


def table(samples: Sequence[Sample]) -> str:
    """A line for each sample."""
    names = [field.name for field in dataclasses.fields(Sample)]
    lines = ["".join(f"{name:>15}" for name in names)]
    for sample in samples:
        lines.append("".join(f"{getattr(sample, name):>15.6g}" for name in names))
    return "\n".join(lines)


def _rss(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def _num_sockets(pid: int) -> int:
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(link).startswith("socket:")
    return count


def _shared_memory_prefix(server: psutil.Process) -> str:
    return RunFolder(Path(server.environ()[RUN_VARIABLE])).shared_memory_prefix
