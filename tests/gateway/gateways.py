"""A gateway on a free port, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from openai import OpenAI

from trident_gateway.app import create_app


@contextlib.contextmanager
def gateway(*urls: str, **settings: Any) -> Iterator[str]:
    """Its address, as http://host:port."""
    server = uvicorn.Server(uvicorn.Config(create_app(urls, **settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def client(address: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
