"""The GPU's runner, sampler and kernels give the CPU's tokens, in the interpreter of the Triton language."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
PARTS = {"test_tokens_equal_those_of_the_cpu": 3, "not test_tokens_equal_those_of_the_cpu": 4}
"""Side by side: which tests, and how many they are."""


def interpret(expression: str) -> subprocess.CompletedProcess[str]:
    # The interpreter is chosen when a kernel is defined, so it needs a process of its own.
    target = str(HERE / "interpreted_gpu_path.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", expression, target]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)


def test_gpu_path_in_the_interpreter():
    with ThreadPoolExecutor(len(PARTS)) as pool:
        results = dict(zip(PARTS, pool.map(interpret, PARTS), strict=True))
    for expression, result in results.items():
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
        assert f"{PARTS[expression]} passed" in result.stdout
