"""TCP ports for the server's endpoints: refuses those in use, picks free ones for 0."""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass

from ..errors import BadRequest
from .options import PORT_OPTIONS, Options


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The three endpoints' ports; none is 0."""

    http: int
    grpc: int
    metrics: int


def choose_ports(options: Options) -> Ports:
    """Free ports on ``options.host``. Raises ``BadRequest`` naming the option and port that cannot be had."""
    wanted = (options.http_port, options.grpc_port, options.metrics_port)
    taken: list[int] = []
    with contextlib.ExitStack() as held:
        # Fixed ports come first, and every socket stays bound until the end, so a free pick never takes one of them.
        chosen = {}
        for index in sorted(range(len(wanted)), key=lambda i: wanted[i] == 0):
            option, port = PORT_OPTIONS[index], wanted[index]
            if port in taken:
                raise BadRequest(f"{option} {port}: another endpoint already has this port")
            chosen[index] = held.enter_context(_bound(options.host, port, option)).getsockname()[1]
            taken.append(chosen[index])
    return Ports(http=chosen[0], grpc=chosen[1], metrics=chosen[2])


def _bound(host: str, port: int, option: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # Closed connections of an earlier server, still in TIME_WAIT, do not stop the next one; a listener does.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise BadRequest(f"--host {host}: not an address of this machine") from None
        reason = "in use" if error.errno == errno.EADDRINUSE else str(error.strerror).lower()
        raise BadRequest(f"{option} {port}: {reason} on {host}; give another port, or 0 for a free one") from None
    return listener
