"""A Triton server for the length of a benchmark: the project's launcher as a child process, and its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
from client_pool import BenchFailed, wait_or_kill

ROOT = Path(__file__).resolve().parents[1]
END_SECONDS = 60.0
"""How long the launcher may take to end its server before it is killed; its watchdog then clears what is left."""
TAIL_LINES = 40
_READY = re.compile(r"ready after ([\d.]+) s.*HTTP +http://(\S+)\n +gRPC +(\S+)\n.*Ctrl-C ends it", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CpuSeconds:
    """CPU time since the start, by kind of process."""

    server: float
    """The Triton server itself."""
    doors: float
    """All instances of all models."""
    engine: float

    def __sub__(self, earlier: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(
            server=self.server - earlier.server, doors=self.doors - earlier.doors, engine=self.engine - earlier.engine
        )


class ServedModel:
    """A started launcher. ``address`` (host:port, gRPC), ``http_address`` and ``start_seconds`` are known once ``wait``
    has returned.

    Use it in a ``with`` statement, whose end ends the server, also when it is still starting.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """``arguments``: of the launcher; ``folder``: for logs."""
        self.address = self.http_address = ""
        self.start_seconds = 0.0
        self._output, self._log = folder / "launcher.txt", folder / "server.log"
        ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trident_llm.launch", *ports, "--no-sample", f"--log={self._log}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is not None:
            return
        self._process.terminate()
        code = wait_or_kill(self._process, END_SECONDS)
        if code:
            print(f"the launcher did not end well: exit code {code}{self.tail()}", file=sys.stderr)

    def wait(self, timeout: float) -> None:
        """Return when the server is ready, and show meanwhile what the launcher says.

        Raises ``BenchFailed`` with the ends of both logs if that takes over ``timeout`` seconds or the launcher ends.
        """
        deadline = time.monotonic() + timeout
        num_shown = 0
        while True:
            code = self._process.poll()
            text = self._output.read_text(errors="replace")
            complete = text[: text.rfind("\n") + 1]
            print(complete[num_shown:], end="", flush=True)
            num_shown = len(complete)
            if match := _READY.search(text):
                self.start_seconds, self.http_address, self.address = float(match[1]), match[2], match[3]
                return
            if code is not None:
                raise BenchFailed(f"the server could not start: its launcher ended with exit code {code}{self.tail()}")
            if time.monotonic() > deadline:
                raise BenchFailed(f"--start-timeout {timeout:g}: the server was not ready by then{self.tail()}")
            time.sleep(0.1)

    def tail(self) -> str:
        """The ends of the launcher's output and of the server's log."""
        parts = []
        for name, path in (("launcher", self._output), ("server log", self._log)):
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            parts.append("\n".join([f"\n--- {name} ---", *lines[-TAIL_LINES:]]))
        return "".join(parts)

    def cpu_seconds(self) -> CpuSeconds:
        used = {"server": 0.0, "doors": 0.0, "engine": 0.0}
        for kind, processes in self.processes().items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    used[kind] += times.user + times.system
        return CpuSeconds(**used)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The launch's processes that live now, by kind: server, doors, engine."""
        found: dict[str, list[psutil.Process]] = {"server": [], "doors": [], "engine": []}
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if kind := _kind(" ".join(process.cmdline())):
                    found[kind].append(process)
        return found


def end_through_contexts() -> None:
    """Let SIGTERM and SIGHUP end this program as an exception would, so that servers it started end too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def environment_of_checkout() -> dict[str, str]:
    """This process's environment, in which Python finds the checkout's packages though they are not installed."""
    paths = [str(ROOT / "backend_src"), str(ROOT / "client"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _kind(command: str) -> str | None:
    words = {"trident_llm.engine.process": "engine", "triton_python_backend_stub": "doors", "tritonserver": "server"}
    return next((kind for word, kind in words.items() if word in command), None)
