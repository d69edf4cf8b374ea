"""bench_unload.py as a command, short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.live
def test_streams_of_an_unloaded_model_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "unload.jsonl"
    result = subprocess.run(
        [sys.executable, "-m", "load_tests.bench_unload", "--doors=1", "--runs=1", f"--out={out}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {(row["workload"], row["metric"]): row["value"] for row in map(json.loads, out.read_text().splitlines())}
    assert 1.0 < rows["unload_doors_1", "cut_s"] < 2.5
    assert 0 < rows["unload_doors_1", "unloaded_after_cut_s"] < 5.0
    assert 0 < rows["one_question", "door_cpu_ms"] < 20
    assert result.stdout.count("UNLOADING") >= 1
