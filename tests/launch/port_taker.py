"""A process that holds ports as a launch does, told what by lines of its standard input.

``HTTP GRPC METRICS HOST`` takes three ports, 0 for free ones, and is answered by them in JSON, or by the error's text.
``release`` gives back all that it has, and is answered by null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from tests.launch.helpers import ECHO_REPOSITORY
from trident_llm.errors import BadRequest
from trident_llm.launch.options import Options, parse_options
from trident_llm.launch.ports import hold_ports


def options(host: str = "127.0.0.1", **ports: int) -> Options:
    """Those of a launch on free ports, but for ``ports``."""
    base = parse_options([f"--model-repository={ECHO_REPOSITORY}"])
    return dataclasses.replace(base, **{"host": host, "http_port": 0, "grpc_port": 0, "metrics_port": 0, **ports})


class PortTaker:
    """Such a process. ``ask`` and ``answer`` are apart, so that several can be asked before one is heard."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def ask(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def answer(self) -> list[int] | str | None:
        assert self._process.stdout is not None
        answer: list[int] | str | None = json.loads(self._process.stdout.readline())
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def two_takers() -> Iterator[tuple[PortTaker, PortTaker]]:
    takers = PortTaker(), PortTaker()
    try:
        yield takers
    finally:
        for taker in takers:
            taker.kill()


def main() -> None:
    held = contextlib.ExitStack()
    for line in sys.stdin:
        answer: list[int] | str | None = None
        if line.strip() == "release":
            held.close()
        else:
            http, grpc, metrics, host = line.split()
            wanted = options(host, http_port=int(http), grpc_port=int(grpc), metrics_port=int(metrics))
            try:
                ports = held.enter_context(hold_ports(wanted))
                answer = [ports.http, ports.grpc, ports.metrics]
            except BadRequest as error:
                answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
