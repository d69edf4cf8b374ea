"""bench_cpu_linear as a command, on few and small layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_format_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "load_tests"))
    import bench_cpu_linear

    monkeypatch.setattr(bench_cpu_linear, "LAYER_SHAPES", ((64, 576), (64, 1536)))
    monkeypatch.setattr(bench_cpu_linear, "HEAD_SHAPE", (128, 576))
    monkeypatch.setattr(bench_cpu_linear, "NUM_LAYERS", 1)
    monkeypatch.setattr(bench_cpu_linear, "ROWS", (1, 80))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_cpu_linear.py", "--runs=2", "--passes=1", f"--out={out}"])
    bench_cpu_linear.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    formats = list(bench_cpu_linear.FORMATS)
    assert [line["variant"] for line in lines] == [name for name in formats for _ in range(3)]
    sizes = {line["variant"]: line["value"] for line in lines if line["workload"] == "weights"}
    assert sizes["4-bit g64"] == pytest.approx(sizes["bf16"] * 4.5 / 16, rel=0.01)
    assert all(line["value"] > 0 and len(line["runs"]) == 2 for line in lines if line["metric"] == "ms")
