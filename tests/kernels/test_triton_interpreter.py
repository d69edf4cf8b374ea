"""Runs the kernels' GPU tests without a GPU, in the interpreter of the Triton language."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes.interpreter import interpret

HERE = Path(__file__).parent
NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """By file; those that are to be tested run side by side."""
    tested = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        names = [item.callspec.params["name"] for item in tested]
        yield {name: pool.submit(interpret, HERE / name, "-m", "gpu") for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("test_cuda_*.py")))
def test_kernels_in_the_interpreter(
    name: str, results: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    result = results[name].result()
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
