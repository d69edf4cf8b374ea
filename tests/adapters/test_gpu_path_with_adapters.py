"""The whole path of a GPU with adapters and mixes, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["interpreted_gpu_path.py", "interpreted_xlora.py"])
def test_engine_in_the_interpreter(name: str) -> None:
    # Kernels choose the interpreter when they are defined, so it needs a process of its own.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / name)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "2 passed" in result.stdout
