"""bench_adapters as a command, with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_variant_is_recorded(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "load_tests/bench_adapters.py"), "--name=tiny", "--runs=1", "--adapters=3"]
    command += [f"--model={ROOT / 'load_tests/models/tiny-llama'}", f"--out={tmp_path / 'out.jsonl'}"]
    command += ["--streams=4", "--new-tokens=100", "--set=load_format=dummy", "--set=device=cpu"]
    command += ["--set=num_threads=1", "--set=max_num_blocks=1024", "--set=dtype=fp32"]
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=110)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    recorded = {(line["variant"], line["workload"]) for line in lines}
    variants = ("base", "lora-1", "lora-3", "xlora-off", "xlora", "xlora-frozen-off", "xlora-frozen")
    assert len(lines) == len(recorded) and recorded == {
        ("load", "streams_4"),
        *((variant, workload) for variant in variants for workload in ("streams_1", "streams_4")),
        *((variant, f"streams_{count}_after_freeze") for variant in variants[-2:] for count in (1, 4)),
    }
    assert all(line["value"] > 0 for line in lines if line["metric"] == "output_tok_s")
