"""bench_kv_quality as a command, with a tiny model of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.tiny_models import write_tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bench(model_folder, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "load_tests/bench_kv_quality.py"), f"--model={model_folder}"]
        command += ["--name=tiny", "--set=dtype=fp32", "--set=device=cpu", "--set=num_threads=1"]
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            [*command, "--sequences=2", "--length=300", f"--out={tmp_path / 'out.jsonl'}", *arguments],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip

    return run


def test_8_bits_are_held_against_the_model_s_own_dtype(bench, tmp_path):
    result = bench()
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    values = {(line["variant"], line["metric"]): line["value"] for line in lines}
    assert {line["workload"] for line in lines} == {"float32_2x300"}
    assert len(values) == 4
    exact, rounded = (values[name, "perplexity"] for name in ("auto", "int8"))
    assert exact != rounded
    assert values["int8", "loss_percent"] == pytest.approx(100 * (rounded / exact - 1), abs=1e-3)
    assert abs(values["int8", "loss_percent"]) < 1
    assert 90 < values["int8", "same_top_percent"] < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes=int8,auto"], "--dtypes: int8,auto; auto must come first"),
        (["--dtypes=auto,fp8"], "kv_cache_dtype: fp8 needs a GPU"),
        (["--sequences=1000000"], "1000000 sequences of 300 are asked for"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, arguments, message):
    result = bench(*arguments)
    assert result.returncode != 0
    assert message in result.stderr
