"""scripts/serve as a user starts it, found by the addresses that it prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.launch.helpers import ROOT, Launch
from tests.live.addresses import Addresses
from trident_llm.launch.ports import Ports

START_SECONDS = 100.0
_ENDPOINTS = r"HTTP +http://127\.0\.0\.1:(\d+)\n +gRPC +127\.0\.0\.1:(\d+)\n +metrics +http://127\.0\.0\.1:(\d+)/metrics"


@dataclass(frozen=True)
class Serving(Addresses):
    """A running scripts/serve. It offers what the clients of tests.live.requests need."""

    launch: Launch


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Serving]:
    """Start scripts/serve with free ports and wait until it serves; end it, and all that is its own, at the end."""
    launch = Launch(folder, [str(ROOT / "scripts/serve")], *arguments)
    try:
        http, grpc, metrics = map(int, launch.wait_for(_ENDPOINTS, START_SECONDS).groups())
        launch.wait_for("Ctrl-C ends it", START_SECONDS)
        yield Serving(Ports(http=http, grpc=grpc, metrics=metrics), launch)
    finally:
        launch.close()
