"""bench_capacity as a command on a small setting, and what its simulation rests on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.capacity import (
    BLOCK_SIZE,
    ChatLength,
    Simulation,
    draw_lengths,
    paged,
    read_lengths,
    smallest_pool,
    static,
)

ROOT = Path(__file__).parents[2]


def test_the_stored_lengths_are_those_of_the_stated_distribution():
    lengths = read_lengths()
    assert lengths == draw_lengths(2000, seed=0)
    assert statistics.fmean(length.prompt + length.output for length in lengths) == pytest.approx(500, abs=5)


def test_a_static_cache_runs_as_many_as_it_has_places_and_allocates_all_of_each():
    usage = Simulation(static(2), [ChatLength(10, 5)] * 6).run()
    assert max(moment.num_running for moment in usage.moments) == 2
    assert {moment.allocated for moment in usage.moments} <= {0, 4096, 8192}
    assert usage.num_computed_tokens == 6 * 14 and usage.num_preemptions == 0


def test_a_paged_cache_allocates_what_it_holds_rounded_up_to_blocks():
    usage = Simulation(paged(64), [ChatLength(10, 30)] * 4).run()
    assert [(moment.allocated, moment.computed) for moment in usage.moments[:8:7]] == [(64, 40), (128, 68)]


def test_the_smallest_pool_is_enough_and_one_block_less_is_not():
    lengths = draw_lengths(60, seed=3)
    pool = smallest_pool(lengths, concurrency=4)
    plenty = Simulation(paged(10_000, max_num_seqs=4), lengths, concurrency=4).run()
    enough = Simulation(paged(pool, max_num_seqs=4), lengths, concurrency=4).run()
    assert enough == plenty and enough.num_preemptions == 0
    less = Simulation(paged(pool - 1, max_num_seqs=4), lengths, concurrency=4).run()
    assert less != plenty
    assert pool * BLOCK_SIZE >= max(moment.computed for moment in plenty.moments)


def test_the_command_records_and_draws(tmp_path):
    lengths, out, picture = tmp_path / "lengths.json", tmp_path / "out.jsonl", tmp_path / "picture.png"
    pairs = [[length.prompt, length.output] for length in draw_lengths(300, seed=1)]
    lengths.write_text(json.dumps({"prompt_and_output_tokens": pairs}))
    command = [sys.executable, str(ROOT / "load_tests/bench_capacity.py"), "--places=4", f"--lengths={lengths}"]
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [*command, f"--out={out}", f"--picture={picture}"],
        check=True, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=100,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    values = {(line["variant"], line["workload"], line["metric"]): line["value"] for line in lines}
    assert values["static", "same_memory", "running_seqs"] <= 4
    assert values["ratio", "same_memory", "running_seqs"] > 6
    assert values["paged", "same_memory", "waste_percent"] < 4 < values["static", "same_memory", "waste_percent"]
    assert values["ratio", "nobody_preempted", "kv_gib"] < 0.35
    assert picture.read_bytes().startswith(b"\x89PNG")
