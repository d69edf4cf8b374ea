"""The GPU's runner, sampler and kernels give the CPU's tokens, in the interpreter of the Triton language."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fakes.interpreter import interpret

HERE = Path(__file__).parent
PARTS = {"test_tokens_equal_those_of_the_cpu": 3, "not test_tokens_equal_those_of_the_cpu": 4}
"""Side by side: which tests, and how many they are."""


def test_gpu_path_in_the_interpreter():
    with ThreadPoolExecutor(len(PARTS)) as pool:
        target = HERE / "interpreted_gpu_path.py"
        results = dict(zip(PARTS, pool.map(lambda part: interpret(target, "-k", part), PARTS), strict=True))
    for expression, result in results.items():
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
        assert f"{PARTS[expression]} passed" in result.stdout
