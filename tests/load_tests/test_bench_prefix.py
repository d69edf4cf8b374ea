"""bench_prefix as a command, with a tiny model whose context is too short for one of the workloads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    settings = {"load_format": "dummy", "device": "cpu", "num_threads": 1, "max_num_blocks": 1024}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "load_tests/bench_prefix.py"), f"--model={tmp_path}", "--name=tiny"]
        command += [f"--set={key}={value}" for key, value in settings.items()]
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            [*command, "--runs=1", "--streams=4", f"--out={tmp_path / 'out.jsonl'}", *arguments],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip

    return run


def test_it_measures_what_the_context_has_room_for(bench, tmp_path):
    result = bench()
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    values = {(line["workload"], line["metric"], line["variant"]): line["value"] for line in lines}
    assert {workload for workload, _, _ in values} == {"prefix_2000", "prefix_streams_4", "prefix_no_hit_4"}
    assert len(values) == 9 and all(value > 0 for value in values.values())
    assert values["prefix_2000", "ratio", "ratio"] < 1 < values["prefix_streams_4", "ratio", "ratio"]


def test_a_workload_that_does_not_fit_is_refused(bench):
    result = bench("--workloads=prefix_8000,prefix_2000")
    assert result.returncode == 2
    assert "--workloads: prefix_8000; allowed: prefix_2000, prefix_streams_4, prefix_no_hit_4" in result.stderr
