"""kill_engine.py as a command, with a few kills."""

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
@pytest.mark.timeout(200)
def test_killed_three_times_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("k")
    out = folder / "kill.jsonl"
    command = [sys.executable, str(ROOT / "load_tests/kill_engine.py"), "--kills=3", "--streams=2", f"--out={out}"]
    result = subprocess.run(
        [*command, "--tokens=150", "--spread=0.5"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), RUN_VARIABLE: str(folder / "runs")},
        capture_output=True,
        text=True,
        timeout=190,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    values = {line["metric"]: line["value"] for line in map(json.loads, out.read_text().splitlines())}
    assert (values["failed"], values["wrong_texts"], values["engine_restarts"]) == (0, 0, 3)
    assert values["requests"] > 2 and 0 < values["restart_median_s"] <= values["restart_longest_s"]
    assert not list((folder / "runs").iterdir())
