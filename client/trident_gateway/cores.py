"""How many workers a gateway has unless told otherwise."""

from __future__ import annotations

import math
import os
from pathlib import Path

MAX_DEFAULT_WORKERS = 8
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def default_workers() -> int:
    """A quarter of the cores, at least 1 and at most 8: engine, doors and the Triton server need the others."""
    return max(1, min(MAX_DEFAULT_WORKERS, usable_cores() // 4))


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by a container's limit on CPU time (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        limit, period = CPU_LIMIT.read_text().split()
        return min(cores, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # there is no file, or it says max
        return cores
