"""Where the gateway listens: sockets, and how the kernel spreads connections over its workers."""

from __future__ import annotations

import contextlib
import errno
import socket

_BACKLOG = 2048
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int, num_workers: int) -> list[list[socket.socket]]:
    """Listening sockets for each worker, one for each address of ``host``. Raises ``OSError``.

    Each worker has sockets of its own, and the kernel chooses among those of one address by a hash of the client's
    address and port (SO_REUSEPORT). From a socket that workers share, one of them can take all connections of a burst,
    and clients keep their connections. This process holds the sockets: connections to a worker that has died wait
    there for the one that takes its place.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[list[socket.socket]] = [[] for _ in range(num_workers)]
    with contextlib.ExitStack() as opened:
        unavailable: OSError | None = None
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                made = _listen_at(family, address, num_workers)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                unavailable = error  # localhost may have an IPv6 address on a machine without IPv6
                continue
            for own, listener in zip(sockets, made, strict=True):
                own.append(opened.enter_context(listener))
        if unavailable is not None and not sockets[0]:
            raise unavailable
        opened.pop_all()
    return sockets


def _listen_at(family: int, address: tuple[object, ...], count: int) -> list[socket.socket]:
    first = socket.create_server(address, family=family, backlog=_BACKLOG)
    with contextlib.ExitStack() as opened:
        opened.enter_context(first)
        if count > 1:
            # Only now, so that a port which another gateway has is refused rather than shared with it.
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        others = [
            opened.enter_context(socket.create_server(address, family=family, backlog=_BACKLOG, reuse_port=True))
            for _ in range(count - 1)
        ]
        opened.pop_all()
    return [first, *others]
