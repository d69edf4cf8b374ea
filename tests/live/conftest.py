"""One real server with the fake engine for all live tests that need no model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.live_server import LiveServer, serve_fake


@pytest.fixture(scope="session")
def fake_server() -> Iterator[LiveServer]:
    """10 ms per token; the admin token is ``secret``; at most 64 requests of 4096 tokens."""
    with tempfile.TemporaryDirectory() as folder, serve_fake(Path(folder), "--set", "admin_token=secret") as server:
        yield server
