"""scripts/serve as a user starts it, found by the addresses that it prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as grpcclient

from tests.launch.helpers import ROOT, Launch
from trident_llm.launch.ports import Ports

START_SECONDS = 100.0
_ENDPOINTS = r"HTTP +http://127\.0\.0\.1:(\d+)\n +gRPC +127\.0\.0\.1:(\d+)\n +metrics +http://127\.0\.0\.1:(\d+)/metrics"


@dataclass(frozen=True)
class Serving:
    """A running scripts/serve. It offers what the clients of tests.live.requests need."""

    launch: Launch
    ports: Ports

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    def grpc_client(self) -> grpcclient.InferenceServerClient:
        return grpcclient.InferenceServerClient(self.grpc_url)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Serving]:
    """Start scripts/serve with free ports and wait until it serves; end it, and all that is its own, at the end."""
    launch = Launch(folder, [str(ROOT / "scripts/serve")], *arguments)
    try:
        http, grpc, metrics = map(int, launch.wait_for(_ENDPOINTS, START_SECONDS).groups())
        launch.wait_for("Ctrl-C ends it", START_SECONDS)
        yield Serving(launch, Ports(http=http, grpc=grpc, metrics=metrics))
    finally:
        launch.close()
