"""Runs the gateway for ``trident openai``: where it listens, and what it asks of clients."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import uvicorn

from trident_client import BadRequest

from .app import create_app

_MAX_LOAD_FACTOR = 100.0
_MAX_DRAIN_SECONDS = 86400


def serve(
    urls: Sequence[str],
    host: str,
    port: int,
    *,
    api_key: str,
    admin_token: str,
    load_factor: float,
    drain_timeout: int,
) -> int:
    """Serve until a signal ends it, and then ``drain_timeout`` seconds more for what runs.

    Raises ``BadRequest`` for arguments that are not allowed.
    """
    if not 0 < port < 65536:
        raise BadRequest(f"--port: {port} is not allowed; give a number from 1 to 65535")
    if not api_key and not _is_loopback(host):
        raise BadRequest(f"--host: {host!r} is reachable from other machines; give --api-key or TRIDENT_API_KEY, too")
    if not 1.0 <= load_factor <= _MAX_LOAD_FACTOR:
        raise BadRequest(f"--load-factor: {load_factor:g} is not allowed; give a number from 1 to {_MAX_LOAD_FACTOR:g}")
    if not 0 <= drain_timeout <= _MAX_DRAIN_SECONDS:
        allowed = f"give seconds from 0 to {_MAX_DRAIN_SECONDS}"
        raise BadRequest(f"--drain-timeout: {drain_timeout} is not allowed; {allowed}")
    app = create_app(urls, api_key=api_key, admin_token=admin_token, load_factor=load_factor)
    print(f"http://{host}:{port}/v1 answers for {', '.join(urls)}", flush=True)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=drain_timeout
    )
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
