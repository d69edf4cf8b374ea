"""Starts the launcher as a process, and looks for what it may have left."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from trident_llm.launch.run_folder import RUN_VARIABLE, SHARED_MEMORY

ROOT = Path(__file__).resolve().parents[2]
ECHO_REPOSITORY = ROOT / "tests/fakes/echo_repository"
END_SECONDS = 5.0
"""What a launch may take from the signal to its end."""


class Launch:
    """A launcher under test, with a run folder of its own. Its output goes to ``folder``."""

    def __init__(self, folder: Path, command: list[str], *arguments: str) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="trident-", dir="/tmp"))
        self._output_path = folder / "output.txt"
        with self._output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--http-port=0", "--grpc-port=0", "--metrics-port=0", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, RUN_VARIABLE: str(self.base), "TRIDENT_PYTHON": sys.executable},
            )

    @classmethod
    def of_echo(cls, folder: Path, *arguments: str) -> Launch:
        """With the echo repository, whose model says at once what it got."""
        command = [sys.executable, "-m", "trident_llm.launch", f"--model-repository={ECHO_REPOSITORY}"]
        return cls(folder, command, *arguments)

    @property
    def output(self) -> str:
        return self._output_path.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float) -> re.Match[str]:
        """The first match of ``pattern`` in the output. Fails with the output if none comes."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.output)):
            assert time.monotonic() < deadline, f"no {pattern!r} within {seconds} s in:\n{self.output}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            time.sleep(0.05)
        return match

    def endpoint(self, seconds: float = 30.0) -> http.client.HTTPConnection:
        """A connection to the HTTP endpoint, once the launcher prints it."""
        match = self.wait_for(r"HTTP +http://([\d.]+):(\d+)\n[^$]*Ctrl-C", seconds)
        return http.client.HTTPConnection(match[1], int(match[2]), timeout=30)

    def ask(self, text: str) -> str:
        """The first answer of the model llm to ``text``."""
        connection = self.endpoint()
        connection.request("POST", "/v2/models/llm/generate", json.dumps({"text_input": text}))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return str(answer["text_output"])

    def members(self) -> list[psutil.Process]:
        """The processes of the launch other than the launcher: they carry its run folder in their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(RUN_VARIABLE, "").startswith(f"{self.base}/"):
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """Processes, shared memory and files that outlived the launcher."""
        regions = SHARED_MEMORY.glob(f"trident-{self.process.pid}-*")
        return [*map(str, self.members()), *map(str, regions), *map(str, self.base.iterdir())]

    def end(self, number: int) -> float:
        """Send a signal and wait for the end; returns the seconds that took."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=30)
        return time.monotonic() - started

    def close(self) -> None:
        """Leave nothing, also after a failed test."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)
        for process in self.members():
            process.kill()
        shutil.rmtree(self.base)
