"""The GPU's runner, sampler and kernels give the CPU's tokens, in the interpreter of the Triton language."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_gpu_path_in_the_interpreter():
    # The interpreter is chosen when a kernel is defined, so it needs a process of its own.
    target = str(HERE / "interpreted_gpu_path.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", target]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "7 passed" in result.stdout
