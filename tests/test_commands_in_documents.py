"""Commands within sentences of the README and docs/operations.md: each is run here, or by the test that is named here.

Blocks of code are those of test_readme.py, which runs all but the ones that say that they need Docker, Kubernetes or a
GPU.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from tests.documents import OPERATIONS, README, commands_within, prose_of
from tests.fakes.fake_triton import FakeTriton
from tests.launch.helpers import ROOT
from trident_client.cli import main
from trident_gateway import command as gateway_command
from trident_gateway.app import create_app
from trident_gateway.workers import Settings

DOCUMENTS = (README, OPERATIONS)
RUN_HERE = {
    "trident stats": ("stats", {}),
    "trident jobs": ("jobs", {}),
    "trident requantize --method awq": ("job", {"id": "ab12"}),
    "trident adapters load cook cook": ("load_adapter", {"name": "cook", "path": "cook", "pinned": False}),
    'trident generate "Soup." --adapter poet:0.7,cook:0.3': "poet:0.7,cook:0.3",
}
"""Against a server that speaks gRPC and has no model; what it was asked last, or with which adapter."""
GATEWAYS = {
    "trident openai --port 9000 --url localhost:8001": (9000, 2),
    "trident openai --url HOST:8001,HOST:9001": (9000, 2),
    "trident openai --workers 4": (9000, 4),
}
"""Command -> its port, and its workers where there are 8 cores."""
RUN_BY = {
    "scripts/serve": "test_readme.py::server",
    "scripts/serve --help": "test_readme.py::test_options_of_scripts_serve_are_known",
    "scripts/serve --doors N": "launch/test_repository.py::test_settings_reach_the_copy_as_they_are",
    "scripts/test": "launch/test_environment_script.py::test_the_scripts_are_programs",
    "trident openai": "gateway/test_gateway.py::test_the_command_refuses",
    "trident top": "client/test_top.py::test_one_frame",
    "trident quantize": "launch/test_weights_commands.py::test_quantize",
    "trident estimate": "launch/test_weights_commands.py::test_estimate",
    "trident requantize": "client/test_cli_requantize.py::test_requantize_follows_its_job",
    "curl -s localhost:8002/metrics": "test_readme.py::test_metrics_are_those_of_the_server",
    ".venv/bin/python load_tests/bench_quality.py --model mistralai/Mistral-7B-Instruct-v0.3 --name mistral-7b "
    "--device cuda": "load_tests/test_bench_quality.py::bench",
    "load_tests/soak.py": "load_tests/test_soak.py::test_a_short_soak_reports_and_leaves_nothing",
}
"""Command -> the test, or the fixture of tests, that runs it, with arguments that fit there."""
NEEDS = {"docker stop --time": "Docker", "helm upgrade": "Kubernetes"}
"""Run by none; the paragraph says what they need."""


def test_every_command_has_its_place() -> None:
    found = {command for document in DOCUMENTS for command in commands_within(prose_of(document))}
    assert found == RUN_HERE.keys() | GATEWAYS.keys() | RUN_BY.keys() | NEEDS.keys()


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_is_complete_and_asks_for_what_it_says(command: str) -> None:
    job = {"id": "ab12", "command": "requantize", "state": "done", "progress": "", "error": "", "seconds": 1.0}
    begun = {**job, "state": "running"}
    with FakeTriton() as server:
        server.results |= {
            "load_adapter": {"name": "cook", "generation": 1}, "requantize": begun, "job": job, "jobs": {"jobs": [job]},
        }  # fmt: skip
        assert main([*shlex.split(command)[1:], "--url", server.url]) == 0
        asked = server.commands[-1] if server.commands else server.generations[-1].parameters["adapter"]
    assert asked == RUN_HERE[command]


@pytest.mark.parametrize("command", GATEWAYS)
def test_a_gateway_starts(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[int, int]] = []

    class Served:
        def __init__(self, settings: Settings, sockets: list[list[int]]) -> None:
            assert create_app(settings.urls)
            served.append((sockets[0][0], len(sockets)))

        def run(self) -> None:
            pass

    monkeypatch.setattr("trident_client.cli_openai.default_workers", lambda: 2)
    monkeypatch.setattr(gateway_command, "listen", lambda host, port, num_workers: [[port]] * num_workers)
    monkeypatch.setattr(gateway_command, "Supervisor", Served)
    assert main(shlex.split(command)[1:]) == 0 and served == [GATEWAYS[command]]


@pytest.mark.parametrize("command", RUN_BY)
def test_the_test_that_runs_a_command_is_there(command: str) -> None:
    """And uses the program, and each of its options."""
    path, _, name = RUN_BY[command].partition("::")
    text = (ROOT / "tests" / path).read_text()
    defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name in defined
    words = shlex.split(command)
    program = next(word for word in words if not word.startswith((".venv/", "trident")))
    wanted = [Path(program).name, *(word for word in words if re.match(r"--?[a-z]", word) and len(word) > 2)]
    if command.startswith("curl"):
        wanted = ["urlopen(server.metrics_url"]
    assert [word for word in wanted if word not in text] == []


@pytest.mark.parametrize("command", NEEDS)
def test_what_is_not_run_says_what_it_needs(command: str) -> None:
    paragraphs = [part for document in DOCUMENTS for part in re.split(r"\n\n|\n- ", prose_of(document))]
    holding = [part for part in paragraphs if command in commands_within(part)]
    assert holding and all(NEEDS[command] in part.replace(command, "") for part in holding)
