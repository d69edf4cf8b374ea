"""The OpenAI gateway for the length of a benchmark or test: ``trident openai`` as a child process, and its end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
from client_pool import BenchFailed, wait_or_kill

START_SECONDS = 30.0
END_SECONDS = 15.0


def other_environment(checkout: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment``, in which Python finds the gateway of another checkout. Raises ``BenchFailed``."""
    client = checkout.resolve() / "client"
    if not (client / "trident_gateway").is_dir():
        raise BenchFailed(f"--other: {checkout} has no client/trident_gateway; give a checkout of this project")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(client), environment["PYTHONPATH"]])}


class ServedGateway:
    """A gateway before the server at ``url``, on a free port. ``address``: host:port.

    Use it in a ``with`` statement, which begins when the gateway says that it is ready and raises ``BenchFailed`` when
    it does not within ``START_SECONDS``.
    """

    def __init__(self, url: str, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        own = ["--port", str(port), "--url", url]
        self._command = [sys.executable, "-m", "trident_client.cli", "openai", *own, *arguments]
        self._environment = dict(environment)
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> ServedGateway:
        self.process = subprocess.Popen(self._command, env=self._environment)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not self._is_ready():
                code = self.process.poll()
                if code is not None:
                    raise BenchFailed(f"the gateway could not start: exit code {code}")
                if time.monotonic() > deadline:
                    raise BenchFailed(f"the gateway was not ready within {START_SECONDS:.0f} s")
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it, by force if it takes too long."""
        self.process.terminate()
        wait_or_kill(self.process, END_SECONDS)

    def cpu_seconds(self) -> dict[int, float]:
        """CPU time since the start of each of its processes, by process id."""
        used = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
        return used

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live now; none where it serves by itself."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def processes(self) -> list[psutil.Process]:
        """The command's own and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/ready", timeout=START_SECONDS) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
