"""Runs the kernels' GPU tests without a GPU, in the interpreter of the Triton language."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.interpreter import interpret

HERE = Path(__file__).parent


# A file takes minutes on a slow machine, more than one test may.
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("test_cuda_*.py")))
def test_kernels_in_the_interpreter(name: str) -> None:
    result = interpret(HERE / name, "-m", "gpu")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
