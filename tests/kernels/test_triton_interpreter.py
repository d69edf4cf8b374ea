"""Runs the kernels' GPU tests without a GPU, in the interpreter of the Triton language."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NUM_PROCESSES = 2


def interpret(name: str) -> subprocess.CompletedProcess[str]:
    # The choice is made when a kernel is defined, so it needs a process of its own.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", str(HERE / name)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """By file; those that are to be tested run side by side."""
    tested = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        yield {name: pool.submit(interpret, name) for name in (item.callspec.params["name"] for item in tested)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("test_cuda_*.py")))
def test_kernels_in_the_interpreter(
    name: str, results: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    result = results[name].result()
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
