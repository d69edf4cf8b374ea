"""The README and docs/operations.md: every block of code is run, every table, name, option and link is checked.

Commands within sentences are those of test_commands_in_documents.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_gateway import ServedGateway

from tests.documents import GATEWAY, OPERATIONS, README, Block, blocks_in, blocks_of, prose_in, prose_of, sample_output
from tests.launch.helpers import ROOT
from tests.live.serving import Serving, serving
from trident_llm.documentation import with_tables
from trident_llm.launch.default_model import default_model
from trident_llm.launch.options import parse_options
from trident_llm.launch.repository import copy_repository
from trident_llm.metrics_catalog import METRICS, published_names

OBSERVABILITY, PERFORMANCE = ROOT / "docs/observability.md", ROOT / "docs/performance.md"
BLOCK_SECONDS = 100
QUESTION = "What is the capital of France?\n"
"""What stands on the standard input of every block: something to say in a chat."""


EXPECTED = {
    README: [
        r"^ Paris",
        r"^loaded dates, generation 1$.*^1999-05-03",
        r"^done in .* 4\.\d\d bits a weight.*^ Paris.*^isq_method +rtn$.*^done in ",
        r'"content": "The capital of France is Paris\.".*"model": "dates".*"text": "1999-05-03',
        r"^The capital of France is Paris\.$",
        r"^engine +ready, 0 restarts .*^requests .*^KV pool .*^adapter .*^dates +",
        r'"text_output":"..',
        r'(data: \{.*"text_output":".*\}\s+){4}',
        r'"finish_reason":"stop".*"text_output":"The capital of France is Paris\."',
        r"^ Paris.* (stop|length) \d+$",
        r"\w+ \w+",
        r"^ Paris.*capital of France is Paris.*^running_requests +0$",
        r"^ Paris",
        r"^ Paris",
        r"^[1-9]\d* requests, 0 failed.*report: .*; passed$",
    ],
    OPERATIONS: [
        r'\\"ready\\": true.*\\"kv_blocks_total\\": \d+.*\\"block_size\\": 16',
        sample_output(OPERATIONS),
    ],
}
"""What the output of each block that is run has, in the document's order."""


def run_blocks() -> list[tuple[Path, int]]:
    return [(document, index) for document, expected in EXPECTED.items() for index in range(len(expected))]


def runnable(document: Path) -> list[Block]:
    return [block for block in blocks_of(document) if block.language != "text" and not block.starts_the_project]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The README's command for its first section, with free ports. One thread leaves the other core to the blocks."""
    (code,) = [block.code for block in blocks_of(README) if block.code.startswith("scripts/serve --set adapter_root=")]
    with serving(tmp_path_factory.mktemp("readme"), *shlex.split(code)[1:], "--set", "num_threads=1") as server:
        yield server


@pytest.fixture(scope="module")
def gateway(server: Serving) -> Iterator[str]:
    """The README's command for the gateway, with a free port: its address, as host:port."""
    (code,) = [block.code for block in blocks_of(README) if block.code.startswith(GATEWAY)]
    assert code == f"{GATEWAY}--port 9000 --url localhost:8001\n"
    with ServedGateway(server.grpc_url, environment()) as gateway:
        yield gateway.address


def run(block: Block, server: Serving, gateway: str, *, own_curl: bool = shutil.which("curl") is None) -> str:
    """The output of ``block``, which runs as it is but for ports, paths of programs, the load test's length, and the
    model from the hub, whose local copy it gets."""
    ports = server.ports
    code = block.code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", default_model())
    code = code.replace("localhost:9000", gateway)
    for port, actual in ((8000, ports.http), (8001, ports.grpc), (8002, ports.metrics)):
        code = code.replace(f"localhost:{port}", f"127.0.0.1:{actual}")
    python = shlex.quote(sys.executable)
    trident = f"{python} -m trident_client.cli "
    code = re.sub(r"(\.venv/bin/trident (?!estimate)(?:adapters )?[a-z]+)", rf"\1 --url {server.grpc_url}", code)
    code = code.replace(".venv/bin/trident ", trident)
    code = code.replace(" top ", f" top --metrics-url {server.metrics_url} ")
    code = re.sub(r"\.venv/bin/python (load_tests/run_load\.py)", rf"{python} \1 --run-time 4", code)
    if own_curl and block.language == "sh":
        code = f'curl() {{ {python} tests/fakes/curl.py "$@"; }}\n{code}'
    command = [sys.executable, "-c", code] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), input=QUESTION, capture_output=True, text=True, timeout=BLOCK_SECONDS
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def environment() -> dict[str, str]:
    paths = [str(ROOT / "backend_src"), str(ROOT / "client"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.live
@pytest.mark.parametrize(("document", "index"), run_blocks(), ids=lambda value: getattr(value, "name", str(value)))
def test_a_block_does_what_it_shows(server: Serving, gateway: str, document: Path, index: int) -> None:
    output = run(runnable(document)[index], server, gateway)
    assert re.search(EXPECTED[document][index], output, re.DOTALL | re.MULTILINE), output


@pytest.mark.live
@pytest.mark.parametrize("index", [index for index, block in enumerate(runnable(README)) if "curl " in block.code])
def test_the_stand_in_for_curl_does_the_same(server: Serving, gateway: str, index: int) -> None:
    output = run(runnable(README)[index], server, gateway, own_curl=True)
    assert re.search(EXPECTED[README][index], output, re.DOTALL | re.MULTILINE), output


@pytest.mark.parametrize("document", EXPECTED, ids=lambda document: document.name)
def test_no_block_is_left_out(document: Path) -> None:
    assert len(runnable(document)) == len(EXPECTED[document])
    assert {block.language for block in blocks_of(document)} <= {"sh", "python", "text"}


@pytest.mark.parametrize("document", EXPECTED, ids=lambda document: document.name)
def test_commands_that_are_not_run_say_what_they_need(document: Path) -> None:
    for section in re.split(r"^##+ ", document.read_text(), flags=re.MULTILINE):
        texts = [block.code for block in blocks_in(section) if block.language == "text"]
        if any(not code.startswith(" ") for code in texts):  # a drawing is indented
            needs = re.search(r"\bneed\s+(Docker|Kubernetes|a\s+GPU)\b", prose_in(section))
            assert needs, section.partition("\n")[0]


def test_the_commands_of_the_project_are_there_and_take_their_arguments(tmp_path: Path) -> None:
    commands = [shlex.split(block.code) for block in blocks_of(README) if block.starts_the_project]
    scripts = ["scripts/serve", "scripts/test", "scripts/serve", "scripts/serve", ".venv/bin/trident"]
    assert [command[0] for command in commands] == scripts
    for number, (script, *arguments) in enumerate(commands[:-1]):
        assert os.access(ROOT / script, os.X_OK)
        if script == "scripts/serve":
            copy_repository(parse_options(arguments), tmp_path / str(number))
    options = parse_options([])
    assert (options.host, options.http_port, options.grpc_port, options.metrics_port) == ("127.0.0.1", 8000, 8001, 8002)


@pytest.mark.parametrize("document", EXPECTED, ids=lambda document: document.name)
def test_options_of_scripts_serve_are_known(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(?:scripts/serve )?(--[a-z-]+)", prose_of(document))) <= known


def test_figures_behind_tuning_are_those_of_performance_md() -> None:
    table = OPERATIONS.read_text().partition("## Tuning\n")[2].partition("\n- ")[0]
    measured = [row.split("|")[3] for row in re.findall(r"^\| .*$", table, re.MULTILINE)][2:]
    figures = [figure for text in measured for figure in re.findall(r"\d[\d,]*(?:\.\d+)?", text) if len(figure) > 3]
    performance = PERFORMANCE.read_text()
    assert len(measured) >= 12 and len(figures) > 20
    assert [f for f in figures if f not in performance and f.replace(",", "") not in performance] == []


def test_tables_are_those_of_the_code() -> None:
    text = README.read_text()
    assert text.count("<!-- table: ") == 3
    assert text == with_tables(text), "run: python -m trident_llm.documentation README.md"
    text = OBSERVABILITY.read_text()
    assert text.count("<!-- table: ") == 1
    assert text == with_tables(text), "run: python -m trident_llm.documentation docs/observability.md"


@pytest.mark.live
def test_metrics_are_those_of_the_server(server: Serving) -> None:
    with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
        published = dict(re.findall(r"^# HELP (trident_\w+) (.*)$", response.read().decode(), re.MULTILINE))
    assert set(published) == {name for spec in METRICS for name in published_names(spec)}
    assert {spec.full_name: spec.meaning for spec in METRICS if spec.kind != "histogram"}.items() <= published.items()
    known = {spec.full_name for spec in METRICS} | {"trident_", "trident_client", "trident_llm"}
    for document in (*EXPECTED, OBSERVABILITY):
        assert set(re.findall(r"`(trident_[a-z_]*)`", document.read_text())) <= known


@pytest.mark.parametrize("document", EXPECTED, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose_of(document)):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = document.parent / path if path else document
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link
