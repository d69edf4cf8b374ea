"""A pytest process in which kernels of the Triton language run in its interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def interpret(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The choice is made when a kernel is defined, so it needs a process of its own."""
    plugins = ("-p", "no:cacheprovider", "-p", "tests.fakes.patch_once")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, *arguments, str(target)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
