"""The whole path of a GPU with adapters and mixes, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.interpreter import interpret

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["interpreted_gpu_path.py", "interpreted_xlora.py"])
def test_engine_in_the_interpreter(name: str) -> None:
    result = interpret(HERE / name)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "2 passed" in result.stdout
