"""The load test as a command, against a server that does what a script says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from load_tests.profiles import PROFILES
from tests.fakes.fake_triton import Answer, Fail, FakeTriton, Hang

ROOT = Path(__file__).parents[2]
LOCUSTFILE = ROOT / "load_tests" / "locustfile.py"


def run(server: FakeTriton, *arguments: str, results: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", server.url]
    if results is not None:
        command += ["--json-file", str(results)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_smoke_run_passes_and_reports_every_event(tmp_path: Path):
    answer = Answer(tuple("abcdefgh"), delay=0.01)
    with FakeTriton(answer) as server:
        finished = run(server, "--profile", "smoke", "--run-time", "3", results=tmp_path / "run")
        generations = server.generations
    assert finished.returncode == 0, finished.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "run.json").read_text())}
    assert set(rows) == {"time_to_first_token", "time_between_tokens", "tokens_per_second", "request"}
    assert {row["method"] for row in rows.values()} == {"grpc"}
    num_requests = rows["request"]["num_requests"]
    assert 4 <= num_requests <= len(generations) <= num_requests + PROFILES["smoke"].users
    assert rows["time_to_first_token"]["num_requests"] == num_requests
    assert rows["time_between_tokens"]["num_requests"] == num_requests * (len(answer.tokens) - 1)
    assert rows["tokens_per_second"]["num_requests"] == num_requests
    assert all(4 <= len(generation.text_input.split()) <= 64 for generation in generations)
    assert all(8 <= int(generation.parameters["max_tokens"]) <= 32 for generation in generations)
    assert len({generation.text_input for generation in generations}) > 1


def test_one_failed_request_fails_the_run():
    with FakeTriton(Answer(), Fail("[UNAVAILABLE] the queue is full"), Answer()) as server:
        finished = run(server, "--run-time", "1")
    assert finished.returncode == 1
    assert "profile smoke: 1 of " in finished.stderr
    assert "the queue is full" in finished.stderr + finished.stdout


def test_a_slow_server_fails_the_run():
    with FakeTriton(Answer(tuple("ab"), delay=1.0)) as server:
        finished = run(server, "--run-time", "2")
    assert finished.returncode == 1
    assert "tokens_per_second: median" in finished.stderr


def test_a_request_that_never_ends_fails_the_run():
    with FakeTriton(Answer(), Hang(("a",))) as server:
        finished = run(server, "--run-time", "1", "--stop-timeout", "1")
        assert server.generations[-1].cancelled.wait(5)
    assert finished.returncode == 1
    assert "not finished when the run was over" in finished.stderr + finished.stdout


def test_an_unknown_profile_is_refused_with_the_known_ones():
    with FakeTriton() as server:
        finished = run(server, "--profile", "nope")
    assert finished.returncode == 1
    assert "--profile: 'nope' is not one of smoke" in finished.stderr
    assert "Traceback" not in finished.stderr
