"""soak.py as a command, short, with real servers; its conclusions from samples; how its load tells wrong answers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from load_tests.soak_load import Load, WrongAnswer
from load_tests.soak_sample import Sample, count_checks, memory_checks, table
from tests.fakes.fake_triton import Answer, Break, Fail, FakeTriton
from trident_client import EngineFailed
from trident_llm.launch.run_folder import RUN_VARIABLE

ROOT = Path(__file__).parents[2]


def sample(minutes: float, **values: float) -> Sample:
    usual: dict[str, Any] = {"server": 50.0, "doors": 300.0, "engine": 400.0, "threads": 9, "descriptors": 8}
    return Sample(minutes=minutes, **{**usual, "server_threads": 99, "sockets": 7, "shared_memory": 3, **values})


@pytest.mark.live
def test_a_short_soak_reports_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    out = folder / "soak.jsonl"
    command = [sys.executable, str(ROOT / "load_tests/soak.py"), "--minutes=0.4", "--warmup=0.2", "--interval=6"]
    result = subprocess.run(
        [*command, "--rate=12", f"--out={out}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), RUN_VARIABLE: str(folder / "runs")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    measured = {(line["variant"], line["metric"]): line for line in lines}
    assert {line["workload"] for line in lines} == {"soak_0.4_min"}
    assert measured["trident", "requests"]["value"] > 100 and measured["echo", "requests"]["value"] > 100
    assert 0 < measured["trident", "kv_blocks_peak"]["value"] <= 512
    zero = ("errors", "engine_restarts", "pool_violations", "shared_memory_growth")
    assert {name: measured["trident", name]["value"] for name in zero} == dict.fromkeys(zero, 0), result.stdout
    assert len(measured["trident", "engine_rss_mib"]["runs"]) >= 3
    assert result.returncode == ("FAILED" in result.stdout), result.stderr
    assert not list((folder / "runs").iterdir())


def test_memory_may_grow_as_much_as_with_an_echo_model_and_a_little() -> None:
    echo = [sample(0, server=40), sample(5, server=50), sample(10, server=51)]
    good = [sample(0, server=10, engine=100), sample(5, server=100, engine=500), sample(10, server=102.9, engine=509)]
    assert all(check.passed for check in memory_checks(good, echo, 5))
    for changed, name in (
        ({"server": 103.1}, "server_growth"),
        ({"server": 100, "doors": 306.1}, "doors_highest"),
        ({"server": 100, "engine": 510.1}, "engine_highest"),
    ):
        checks = memory_checks([*good[:2], sample(10, **{"engine": 500.0, **changed})], echo, 5)
        assert [check.name for check in checks if not check.passed] == [name]


def test_memory_that_only_the_echo_model_gave_back_is_not_asked_for() -> None:
    checks = memory_checks([sample(5), sample(6)], [sample(5, server=50), sample(6, server=40)], 5)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("name", ["server_threads", "threads", "descriptors", "sockets", "shared_memory"])
def test_counts_may_not_exceed_the_highest_of_the_warmup(name: str) -> None:
    samples = [sample(0, **{name: 10}), sample(5, **{name: 8}), sample(6, **{name: 12}), sample(7, **{name: 10})]
    assert all(check.passed for check in count_checks(samples, 5))
    checks = count_checks([*samples, sample(8, **{name: 11})], 5)
    assert [check.name for check in checks if not check.passed] == [f"{name}_growth"]
    assert len(table(samples).splitlines()) == 5


def test_a_load_counts_what_went_wrong() -> None:
    async def ask(answers: list[Any]) -> Load:
        with FakeTriton() as server:
            server.script = answers
            load = Load(
                grpc=server.url, http="localhost:1", is_echo=False, rate=9, max_model_len=9, seed=0, grpc_cancels=True
            )
            async with load:
                for answer in answers:
                    error = {Fail: EngineFailed, Break: EngineFailed}.get(type(answer), WrongAnswer)
                    with pytest.raises(error):
                        await load.ask("hello", {"max_tokens": 1}, stream=True)
                server.script = [Fail("[INTERNAL] it broke")]
                await load._live.acquire()
                await load._send("shared", load._rng)
        return load

    load = asyncio.run(ask([Answer(("a", "b")), Fail("[INTERNAL] it broke"), Break(("a",))]))
    assert dict(load.errors) == {"shared: EngineFailed: [INTERNAL] it broke": 1}
