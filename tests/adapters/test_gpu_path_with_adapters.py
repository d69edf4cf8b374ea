"""The whole path of a GPU with adapters and mixes, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.interpreter import interpret

HERE = Path(__file__).parent


@pytest.mark.parametrize(("name", "count"), [("interpreted_gpu_path.py", 3), ("interpreted_xlora.py", 2)])
def test_engine_in_the_interpreter(name: str, count: int) -> None:
    result = interpret(HERE / name)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert f"{count} passed" in result.stdout
