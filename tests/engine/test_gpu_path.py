"""The GPU's runner, sampler and kernels give the CPU's tokens, in the interpreter of the Triton language."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.interpreter import interpret

HERE = Path(__file__).parent


def test_gpu_path_in_the_interpreter():
    result = interpret(HERE / "interpreted_gpu_path.py")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "7 passed" in result.stdout
