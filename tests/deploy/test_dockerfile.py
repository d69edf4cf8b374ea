"""The Dockerfile: hadolint finds nothing, and what hadolint does not know holds too. It is linted here, never built."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

from tests.launch.helpers import ROOT

TEXT = (ROOT / "Dockerfile").read_text()


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True, timeout=30)


def test_hadolint_finds_nothing() -> None:
    result = lint(ROOT / "Dockerfile")
    assert result.returncode == 0, result.stdout + result.stderr


def test_hadolint_finds_a_base_image_without_a_tag(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(re.sub(r"(?m)^(FROM [^:\n]+):\S+$", r"\1", TEXT))
    assert "DL3006" in lint(tmp_path / "Dockerfile").stdout


def test_the_base_image_is_a_release_by_number_and_the_user_is_not_root() -> None:
    assert re.findall(r"(?m)^FROM (.*)$", TEXT) == ["nvcr.io/nvidia/tritonserver:26.07-py3"]
    (user,) = re.findall(r"(?m)^USER (.*)$", TEXT)
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


def test_the_health_check_asks_for_the_engine() -> None:
    (check,) = re.findall(r"(?s)HEALTHCHECK .*?CMD (\[.*?\])\n", TEXT)
    assert "trident_engine_ready" in check and ":8002/metrics" in check
