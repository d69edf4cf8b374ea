"""bench_overload.py as a command, short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trident_llm.launch.run_folder import RUN_VARIABLE

ROOT = Path(__file__).parents[2]


@pytest.mark.live
def test_overload_is_refused_and_measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("o")
    out = folder / "overload.jsonl"
    result = subprocess.run(
        [sys.executable, str(ROOT / "load_tests/bench_overload.py"), "--seconds=2", "--rounds=1", "--tokens=32",
         f"--out={out}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), RUN_VARIABLE: str(folder / "runs")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {(row["workload"], row["metric"]): row["value"] for row in map(json.loads, out.read_text().splitlines())}
    assert rows["overload", "refused"] > 0 and rows["overload", "accepted"] > 0
    assert 0 < rows["overload", "refusal_p50_ms"] <= rows["overload", "refusal_p99_ms"]
    ratio = rows["overload", "latency_p95_ms"] / rows["capacity", "latency_p95_ms"]
    assert rows["overload", "latency_p95_ratio"] == pytest.approx(ratio, rel=1e-3)
    cores = [rows["overload", f"{user}_cores"] for user in ("clients", "server", "doors", "engine", "others")]
    assert all(used > 0 for used in cores[:4]) and sum(cores) <= 1.1 * os.cpu_count()
    assert not list((folder / "runs").iterdir())
