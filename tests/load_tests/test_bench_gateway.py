"""bench_gateway as a command, with a real Triton server and a tiny model; its HTTP client, with scripted servers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.fake_triton import Answer, Behaviour, Fail, FakeTriton
from tests.gateway.gateways import gateway
from tests.load_tests.test_bench_server import SETTINGS, TINY_LLAMA
from trident_llm.launch.run_folder import RUN_VARIABLE

ROOT = Path(__file__).parents[2]


def run_bench(folder: Path, *arguments: str) -> tuple[int, str]:
    """Its exit code and its output; what it leaves behind fails the test."""
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(TINY_LLAMA))
    (folder / "runs").mkdir()
    command = [sys.executable, str(ROOT / "load_tests/bench_gateway.py"), f"--model={folder / 'model'}", "--name=tiny"]
    command += ["--variant=fp32", "--runs=2", "--streams=8", "--tokens=32", "--clients=2", f"--out={folder / 'out'}"]
    command += [f"--set={key}={value}" for key, value in SETTINGS.items()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        RUN_VARIABLE: str(folder / "runs"),
    }
    done = subprocess.run(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN_VARIABLE, "").startswith(str(folder / "runs")):
                left.append(process)
    assert not left and not list((folder / "runs").iterdir())
    return done.returncode, done.stdout


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its name is short: sockets lie in it."""
    return tmp_path_factory.mktemp("b")


@pytest.mark.live
def test_both_ways_and_another_checkout_are_measured(folder: Path) -> None:
    code, output = run_bench(folder, "--workers=2", f"--other={ROOT}")
    assert code == 0, output
    rows = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    lines = {(row["workload"], row["metric"]): row for row in rows}
    gateways = {"tokens_per_s", "client_cpu_share", "cpu_us_per_token", "busiest_worker_cores", "share_of_direct"}
    direct = {"tokens_per_s", "client_cpu_share"}
    wanted = {(f"{way}_one_client", "first_token_ms") for way in ("direct", "gateway", "other")}
    wanted |= {("direct_streams_8", metric) for metric in direct}
    wanted |= {(f"{way}_streams_8", metric) for way in ("gateway", "other") for metric in gateways}
    assert set(lines) == wanted
    for row in rows:
        assert (row["benchmark"], row["model"], row["variant"]) == ("bench_gateway", "tiny", "fp32")
        assert len(row["runs"]) == 2 and row["value"] > 0
        settings = row["settings"]
        assert (settings["streams"], settings["tokens"], settings["clients"]) == (8, 32, 2)
        assert settings["prefix_caching"] == "false" and row["workload"].startswith(settings["way"])
        assert settings.get("workers") == (2 if settings["way"] == "gateway" else None)
    shares = [
        ours / theirs
        for ours, theirs in zip(
            lines["gateway_streams_8", "tokens_per_s"]["runs"],
            lines["direct_streams_8", "tokens_per_s"]["runs"],
            strict=True,
        )
    ]
    assert lines["gateway_streams_8", "share_of_direct"]["runs"] == pytest.approx(shares, rel=1e-3)
    table = output.splitlines()[-4:]
    assert table[0].split()[:2] == ["way", "workers"]
    assert [line.split()[0] for line in table[1:]] == ["direct", "gateway", "other"]


@pytest.mark.live
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--workers=65",), 1, "bench_gateway: the gateway could not start: exit code 2"),
        (("--other=/nowhere",), 1, "--other: /nowhere has no client/trident_gateway"),
        (("--start-timeout=0.5",), 1, "--start-timeout 0.5: the server was not ready by then"),
    ],
)
def test_what_cannot_start_ends_with_a_reason(folder: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    ended, output = run_bench(folder, *arguments)
    assert ended == code and words in output and "Traceback" not in output
    assert not (folder / "out").exists()


def test_the_cost_of_a_token_is_compared(folder: Path) -> None:
    arguments = ["--streams=16", "--tokens=100", "--runs=2", f"--other={ROOT}", f"--out={folder / 'out'}"]
    command = [sys.executable, str(ROOT / "load_tests/bench_gateway_core.py"), *arguments]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=100)
    rows = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    found = {(row["variant"], row["workload"], row["metric"]) for row in rows}
    assert found == {
        (way, workload, metric)
        for way in ("gateway", "other")
        for workload in ("at_once", "every_20_ms")
        for metric in ("tokens_per_cpu_s", "tokens_per_s", "memory_mb")
    }
    assert all(len(row["runs"]) == 2 and row["value"] > 0 for row in rows)
    last = done.stdout.splitlines()[-2:]
    assert [line.split(":")[0] for line in last] == ["at_once", "every_20_ms"]
    assert all("times the other's tokens" in line for line in last)


def test_connections_to_workers_are_counted(folder: Path) -> None:
    arguments = ["--workers=2", "--connections=40", "--runs=1", f"--out={folder / 'out'}"]
    command = [sys.executable, str(ROOT / "load_tests/bench_accept.py"), *arguments]
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=60)
    rows = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    assert [(row["variant"], row["workload"]) for row in rows] == [
        ("shared", "at_once"), ("shared", "one_by_one"), ("own", "at_once"), ("own", "one_by_one")
    ]  # fmt: skip
    assert all(0.5 <= row["value"] <= 1.0 for row in rows) and all(row["value"] < 0.9 for row in rows[2:])


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server


@pytest.fixture(scope="module")
def client(triton: FakeTriton) -> Iterator[subprocess.Popen[str]]:
    """A client process of a gateway before ``triton``."""
    with gateway(triton.url) as address:
        address = address.removeprefix("http://")
        command = [sys.executable, str(ROOT / "load_tests/gateway_client.py"), address]
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"connected": address}
        yield process
        process.communicate(timeout=10)
        assert process.returncode == 0


def order(client: subprocess.Popen[str], prompts: list[str], new_tokens: list[int]) -> dict[str, Any]:
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
    client.stdin.flush()
    assert json.loads(client.stdout.readline()) == {"prepared": len(prompts)}
    client.stdin.write(json.dumps(time.monotonic() + 0.1) + "\n")
    client.stdin.flush()
    report: dict[str, Any] = json.loads(client.stdout.readline())
    return report


def test_a_client_times_streams_and_counts_tokens(triton: FakeTriton, client: subprocess.Popen[str]) -> None:
    triton.script[:] = [Answer(("", *"abcd"), delay=0.1, first_delay=0.2)]
    triton.generations.clear()
    began = time.monotonic()
    report = order(client, ["one", "two", "three"], [5, 5, 5])
    assert 0 <= report["cpu_seconds"] < report["seconds"]
    for stream in report["streams"]:
        assert stream["error"] == "" and stream["output_tokens"] == 5
        assert stream["responses"] == 5, "one for each text, and the usage"
        assert stream["submitted"] >= began + 0.1
        assert stream["first_text"] == stream["first_token"]
        assert 0.3 <= stream["first_text"] - stream["submitted"] < 0.4, "the first token has no text"
        assert 0.3 <= stream["ended"] - stream["first_text"] < 0.5
    assert {generation.text_input for generation in triton.generations} == {"one", "two", "three"}
    wanted = {"temperature": 0, "ignore_eos": True, "max_tokens": 5, "stream": True}
    for generation in triton.generations:
        assert {key: generation.parameters[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Fail("[UNAVAILABLE] the queue is full"), "429 Too Many Requests"),
        (Fail("[INTERNAL] broke", ("a",)), "broke"),
        (Answer(("a",)), "1 output tokens instead of 2"),
    ],
)
def test_a_client_names_what_failed(
    triton: FakeTriton, client: subprocess.Popen[str], behaviour: Behaviour, error: str
) -> None:
    triton.script[:] = [Answer(("a", "b")), behaviour]
    found = sorted(stream["error"] for stream in order(client, ["x", "x"], [2, 2])["streams"])
    assert found[0] == "" and error in found[1]
