"""The launcher with a real Triton server and a model that answers at once: start, failure, and every kind of end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.helpers import ECHO_REPOSITORY, END_SECONDS, Launch

pytestmark = pytest.mark.live


@pytest.fixture
def launch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Launch]:
    """A launcher started with the test's own arguments."""
    launch = Launch.of_echo(tmp_path, *getattr(request, "param", ()))
    yield launch
    launch.close()


TEXT = 'q"uo\\te\n} ü'


@pytest.mark.parametrize("launch", [("--set", f"revision={TEXT}")], indirect=True)
def test_it_serves_and_leaves_nothing(launch: Launch) -> None:
    launch.wait_for(r"is ready after [\d.]+ s\.\n\n> What is the capital of France\?\n.*capital of France", 30)
    assert launch.ask("setting revision") == TEXT
    assert len(launch.members()) >= 3
    assert launch.end(signal.SIGTERM) < END_SECONDS
    assert launch.process.returncode == 0 and launch.leftovers() == []


def test_a_request_under_way_does_not_delay_the_end(launch: Launch) -> None:
    connection = launch.endpoint()
    connection.request("POST", "/v2/models/llm/generate", json.dumps({"text_input": "wait"}))
    time.sleep(0.5)
    assert launch.end(signal.SIGINT) < END_SECONDS
    assert launch.leftovers() == []
    connection.close()


def test_a_hangup_that_is_ignored_from_the_start_ends_nothing(tmp_path: Path) -> None:
    """As by nohup, so that it goes on when the terminal is gone."""
    command = ["nohup", sys.executable, "-m", "trident_llm.launch", f"--model-repository={ECHO_REPOSITORY}"]
    launch = Launch(tmp_path, command)
    try:
        launch.endpoint().close()
        launch.process.send_signal(signal.SIGHUP)
        time.sleep(1.0)
        assert launch.ask("hello").strip() == "hello"
        assert launch.end(signal.SIGTERM) < END_SECONDS
    finally:
        launch.close()


def test_nothing_outlives_a_killed_launcher(launch: Launch) -> None:
    launch.endpoint().close()
    launch.end(signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while launch.leftovers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert launch.leftovers() == []


@pytest.mark.parametrize("launch", [("--set", "revision=slow")], indirect=True)
def test_it_ends_while_the_model_loads(launch: Launch) -> None:
    launch.wait_for("starting the Triton server", 20)
    deadline = time.monotonic() + 20
    while len(launch.members()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert launch.end(signal.SIGHUP) < END_SECONDS
    assert launch.process.returncode == 0 and launch.leftovers() == []


@pytest.mark.parametrize("launch", [("--set", "revision=broken")], indirect=True)
def test_a_model_that_does_not_load_says_why(launch: Launch) -> None:
    assert launch.process.wait(timeout=30) == 1
    assert "llm: [NOT_FOUND] model: 'no/such' is not there;\nlook again\n" in launch.output
    assert "Traceback" not in launch.output and launch.leftovers() == []


@pytest.mark.parametrize("launch", [("--only", "other")], indirect=True)
def test_only_the_named_models_are_loaded(launch: Launch) -> None:
    connection = launch.endpoint()
    states = {}
    for name in ("llm", "other"):
        connection.request("GET", f"/v2/models/{name}/ready")
        response = connection.getresponse()
        response.read()
        states[name] = response.status
    assert states == {"llm": 400, "other": 200}
    connection.request("POST", "/v2/models/other/generate", json.dumps({"text_input": "same"}))
    assert json.loads(connection.getresponse().read())["text_output"] == "same"
    connection.close()


@pytest.mark.parametrize("launch", [("--host", "0.0.0.0", "--set", "admin_token=x")], indirect=True)
def test_other_machines_cannot_change_the_server(launch: Launch) -> None:
    connection = launch.endpoint()
    for path in ("repository/index", "systemsharedmemory/region/x/register", "logging", "trace/setting"):
        connection.request("POST", f"/v2/{path}", "{}")
        response = connection.getresponse()
        response.read()
        assert response.status == 403, path
    assert launch.ask("hello") == "hello "
    connection.close()


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "trident_llm.launch", f"--model-repository={ECHO_REPOSITORY}", "--http-port", port],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"scripts/serve: [INVALID_ARG] --http-port {port}: in use on 127.0.0.1")
