"""Client processes of a benchmark, as one: hands out requests, starts them at the same time, gathers reports."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from client_orders import Stream

GRPC_CLIENT = Path(__file__).parent / "stream_client.py"
HTTP_CLIENT = Path(__file__).parent / "gateway_client.py"
LEAD_SECONDS = 0.05
"""From the announcement of the common start to the start."""
END_SECONDS = 5.0


class BenchFailed(Exception):
    """The benchmark cannot go on; the text says why, for its user."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All streams of one run, and what the busiest client used of one core."""

    streams: list[Stream]
    client_cpu_share: float
    client_cpu_seconds: float

    @property
    def seconds(self) -> float:
        """From the first submission to the last end."""
        return max(stream.ended for stream in self.streams) - min(stream.submitted for stream in self.streams)

    @property
    def output_tokens(self) -> int:
        return sum(stream.output_tokens for stream in self.streams)

    @property
    def responses(self) -> int:
        return sum(stream.responses for stream in self.streams)

    def first_token_ms(self, quantile: float) -> float:
        """Milliseconds from a stream's submission to its first token; the nearest rank of ``quantile``."""
        waits = sorted(stream.first_token - stream.submitted for stream in self.streams)
        return waits[max(math.ceil(quantile * len(waits)) - 1, 0)] * 1e3

    def first_text_ms(self) -> float:
        """Milliseconds from a stream's submission to its first text; the median."""
        return statistics.median(stream.first_text - stream.submitted for stream in self.streams) * 1e3


class ClientPool:
    """``count`` client processes of the server at ``address`` (host:port), which speaks what ``program`` does. Use it
    in a ``with`` statement."""

    def __init__(self, address: str, count: int, environment: dict[str, str], program: Path = GRPC_CLIENT) -> None:
        self._clients = [
            subprocess.Popen(
                [sys.executable, str(program), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for _ in range(count)
        ]

    def __enter__(self) -> ClientPool:
        try:
            for client in self._clients:
                _hear(client)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, prompts: Sequence[str], new_tokens: Sequence[int]) -> Run:
        """Send all requests at once, spread evenly over the clients. Raises ``BenchFailed`` if any of them fails."""
        clients = self._clients[: len(prompts)]
        for index, client in enumerate(clients):
            share = slice(index, None, len(clients))
            _say(client, {"prompts": prompts[share], "new_tokens": new_tokens[share]})
        for client in clients:
            _hear(client)
        start = time.monotonic() + LEAD_SECONDS
        for client in clients:
            _say(client, start)
        reports = [_hear(client) for client in clients]
        run = Run(
            streams=[Stream(**stream) for report in reports for stream in report["streams"]],
            client_cpu_share=max(report["cpu_seconds"] / report["seconds"] for report in reports),
            client_cpu_seconds=sum(report["cpu_seconds"] for report in reports),
        )
        _check(run.streams)
        return run

    def close(self) -> None:
        """End all clients; one that is still busy is killed."""
        for client in self._clients:
            assert client.stdin is not None
            try:
                client.stdin.close()
            except BrokenPipeError:
                continue
        deadline = time.monotonic() + END_SECONDS
        for client in self._clients:
            wait_or_kill(client, max(deadline - time.monotonic(), 0.0))


def wait_or_kill(process: subprocess.Popen[Any], seconds: float) -> int:
    """The exit code of a process that was asked to end, which it may take so long for."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _say(client: subprocess.Popen[str], message: Any) -> None:
    assert client.stdin is not None
    try:
        client.stdin.write(json.dumps(message) + "\n")
        client.stdin.flush()
    except BrokenPipeError:
        raise BenchFailed(f"a client process ended with exit code {client.wait()}") from None


def _hear(client: subprocess.Popen[str]) -> Any:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise BenchFailed(f"a client process ended with exit code {client.wait()}")
    return json.loads(line)


def _check(streams: Sequence[Stream]) -> None:
    errors = Counter(stream.error for stream in streams if stream.error)
    if errors:
        shown = "\n".join(f"  {count} times: {error}" for error, count in errors.most_common(5))
        raise BenchFailed(f"{errors.total()} of {len(streams)} requests failed:\n{shown}")
