"""Runs the gateway for ``trident openai``: where it listens, and what it asks of clients."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import uvicorn

from trident_client import BadRequest
from trident_client.wire import check_url

from .app import create_app

_SHUTDOWN_SECONDS = 5


def serve(urls: Sequence[str], host: str, port: int, *, api_key: str, admin_token: str) -> int:
    """Serve until a signal ends it. Raises ``BadRequest`` for addresses that are not allowed."""
    if not 0 < port < 65536:
        raise BadRequest(f"--port: {port} is not allowed; give a number from 1 to 65535")
    if not api_key and not _is_loopback(host):
        raise BadRequest(f"--host: {host!r} is reachable from other machines; give --api-key or TRIDENT_API_KEY, too")
    app = create_app([check_url(url) for url in urls], api_key=api_key, admin_token=admin_token)
    print(f"http://{host}:{port}/v1 answers for {', '.join(urls)}", flush=True)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS
    )
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
