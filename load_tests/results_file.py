"""Benchmark results: one JSON object a line in load_tests/results, and the words that say where they came from."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class ResultsFile:
    """Appends to ``path``; everything but the measurement itself is the same on every line."""

    path: Path
    benchmark: str
    model: str
    variant: str
    settings: Mapping[str, Any]

    def record(self, workload: str, metric: str, runs: Sequence[float]) -> float:
        """Write one measurement, whose value is the median of ``runs``; returns it and prints a line."""
        value = statistics.median(runs)
        line = {
            "benchmark": self.benchmark,
            "device": device_name(),
            "model": self.model,
            "variant": self.variant,
            "workload": workload,
            "metric": metric,
            "value": round(value, 4),
            "runs": [round(run, 4) for run in runs],
            "settings": dict(self.settings),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{run:.4g}" for run in runs)
        print(f"{self.variant:>14} {workload:<20} {value:10.2f} {metric:<14} (runs {shown})", flush=True)
        return value


def device_name() -> str:
    """The GPU, or the CPU with its number of usable cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            model = row.split(":", 1)[1].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for speed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The checkout's commit, with a mark when files differed from it before the first result was written."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
