"""The Dockerfile: hadolint finds nothing, and what hadolint does not know holds too. It is linted here, never built."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from tests.deploy.gateway_arguments import gateway_arguments
from tests.gateway.gateways import gateway
from tests.launch.helpers import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
STAGES = dict(re.findall(r"(?ms)^FROM \S+ AS (\w+)$(.*?)(?=^FROM |\Z)", TEXT))
"""Name -> instructions, in the order of the file."""


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True, timeout=30)


def test_hadolint_finds_nothing() -> None:
    result = lint(ROOT / "Dockerfile")
    assert result.returncode == 0, result.stdout + result.stderr


def test_hadolint_finds_a_base_image_without_a_tag(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(re.sub(r"(?m)^(FROM [^:\n]+):\S+", r"\1", TEXT))
    assert lint(tmp_path / "Dockerfile").stdout.count("DL3006") == len(STAGES)


def test_base_images_are_releases_by_number_and_users_are_not_root() -> None:
    bases = ["python:3.12.12-slim-bookworm AS gateway", "nvcr.io/nvidia/tritonserver:26.07-py3 AS server"]
    assert re.findall(r"(?m)^FROM (.*)$", TEXT) == bases
    assert list(STAGES) == ["gateway", "server"], "the last is what is built by default"
    for instructions in STAGES.values():
        (user,) = re.findall(r"(?m)^USER (.*)$", instructions)
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_each_copied_file_is_there_and_passes_the_ignore_file() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for sources in re.findall(r"(?m)^COPY (.*) \S+$", TEXT) for name in sources.split()}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_every_pip_installation_uses_the_pins_and_the_builders_cache() -> None:
    steps = [step for step in re.findall(r"(?ms)^RUN (.*?[^\\])$", TEXT) if "pip install" in step]
    assert steps
    for step in steps:
        assert "--mount=type=cache,target=/root/.cache/pip" in step
        assert step.count("pip install") == step.count("pip install -c constraints.txt")
        assert "--no-cache-dir" not in step


def test_what_is_dear_to_make_outlives_the_container() -> None:
    (volume,) = re.findall(r"(?m)^VOLUME (.*)$", STAGES["server"])
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        (folder,) = re.findall(rf"\b{variable}=(\S+)", STAGES["server"])
        assert f"{folder}/".startswith(f"{volume}/"), variable


def health_check(stage: str) -> list[str]:
    (check,) = re.findall(r"(?s)HEALTHCHECK .*?CMD (\[.*?\])\n", STAGES[stage])
    return list(json.loads(check.replace("\\\n", "")))


def test_the_servers_health_check_asks_for_the_engine() -> None:
    (shell, _, check) = health_check("server")
    assert shell == "bash" and "trident_engine_ready" in check and ":8002/metrics" in check


def test_the_gateways_health_check_runs_and_its_image_has_what_it_needs() -> None:
    (python, _, check) = health_check("gateway")
    assert python == "/opt/trident/.venv/bin/python" and "WORKDIR /opt/trident\n" in STAGES["gateway"]
    with gateway("127.0.0.1:1") as address:
        code = check.replace("http://127.0.0.1:9000", address)
        assert code != check
        assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=30).returncode == 1
    assert f"EXPOSE {gateway_arguments([]).port}\n" in STAGES["gateway"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ".[gateway]" in STAGES["gateway"] and "COPY client client" in STAGES["gateway"]
    assert {"fastapi", "uvicorn"} <= {re.split(r"\W", name)[0] for name in project["optional-dependencies"]["gateway"]}
