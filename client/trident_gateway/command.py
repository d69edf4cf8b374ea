"""Runs the gateway for ``trident openai``: checks its arguments, listens, and serves alone or by workers."""

from __future__ import annotations

import ipaddress

from trident_client import BadRequest, Overloaded

from .listen import listen
from .places import read_places
from .workers import Settings, Supervisor, serve_alone

MAX_WORKERS = 64
_MAX_LOAD_FACTOR = 100.0
_MAX_DRAIN_SECONDS = 86400


def serve(settings: Settings, host: str, port: int, num_workers: int) -> int:
    """Serve until a signal ends it, and then ``settings.drain_timeout`` seconds more for what runs.

    Raises ``BadRequest`` for arguments that are not allowed, and ``Overloaded`` where it cannot listen or start.
    """
    check(settings, host, port, num_workers)
    try:
        sockets = listen(host, port, num_workers)
    except OSError as error:
        raise Overloaded(f"--host, --port: {host}:{port} cannot be listened at: {error.strerror or error}") from None
    by = f", by {num_workers} workers" if num_workers > 1 else ""
    print(f"http://{host}:{port}/v1 answers for {', '.join(settings.urls)}{by}", flush=True)
    if num_workers > 1:
        Supervisor(settings, sockets).run()
    else:
        serve_alone(settings, sockets[0])
    return 0


def check(settings: Settings, host: str, port: int, num_workers: int) -> None:
    """Raises ``BadRequest``."""
    if not 0 < port < 65536:
        raise BadRequest(f"--port: {port} is not allowed; give a number from 1 to 65535")
    if not settings.api_key and not _is_loopback(host):
        raise BadRequest(f"--host: {host!r} is reachable from other machines; give --api-key or TRIDENT_API_KEY, too")
    if not 1.0 <= settings.load_factor <= _MAX_LOAD_FACTOR:
        allowed = f"give a number from 1 to {_MAX_LOAD_FACTOR:g}"
        raise BadRequest(f"--load-factor: {settings.load_factor:g} is not allowed; {allowed}")
    if not 0 <= settings.drain_timeout <= _MAX_DRAIN_SECONDS:
        allowed = f"give seconds from 0 to {_MAX_DRAIN_SECONDS}"
        raise BadRequest(f"--drain-timeout: {settings.drain_timeout} is not allowed; {allowed}")
    if not 1 <= num_workers <= MAX_WORKERS:
        raise BadRequest(f"--workers: {num_workers} is not allowed; give a number from 1 to {MAX_WORKERS}")
    read_places(settings.urls)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
