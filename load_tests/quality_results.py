"""Reads what bench_quality has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from performance_tables import latest

BOTH = "both"
"""The workload of all texts together."""


def read_measured(path: Path, model: str, device: str | None = None) -> dict[str, dict[str, float]]:
    """The latest metrics of all texts by variant; device None: that of the last line."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["model"] == model]
    device = device or (lines[-1]["device"] if lines else None)
    found: dict[str, dict[str, float]] = {}
    for line in latest(line for line in lines if line["device"] == device and line["workload"] == BOTH):
        found.setdefault(line["variant"], {})[line["metric"]] = line["value"]
    return found
