"""TCP ports for the server's endpoints: refuses those in use, picks free ones for 0, and holds what was chosen.

The server binds its ports seconds after they were chosen. Until then, and for the launch's life, each has a socket in
the kernel's abstract namespace (unix(7)), a name that one process can have at a time: it knows no folders and users,
is as wide as the TCP ports themselves (a network namespace), and goes with the process that bound it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadRequest
from .options import PORT_OPTIONS, Options

_NAMES = "trident-llm/port/"
"""What names of held ports start with; the port and the address follow."""
_ANY_ADDRESS = "0.0.0.0"


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The three endpoints' ports; none is 0."""

    http: int
    grpc: int
    metrics: int


@contextlib.contextmanager
def hold_ports(options: Options) -> Iterator[Ports]:
    """Free ports on ``options.host``, which no other launch gets while the context lasts.

    Raises ``BadRequest`` naming the option and port that cannot be had.
    """
    with contextlib.ExitStack() as held:
        yield _choose(options, held)


def _choose(options: Options, held: contextlib.ExitStack) -> Ports:
    wanted = (options.http_port, options.grpc_port, options.metrics_port)
    chosen: dict[int, int] = {}
    with contextlib.ExitStack() as bound:
        # Fixed ports come first, and every socket stays bound until the end, so a free pick never takes one of them.
        for index in sorted(range(len(wanted)), key=lambda i: wanted[i] == 0):
            option, port = PORT_OPTIONS[index], wanted[index]
            if port in chosen.values():
                raise BadRequest(f"{option} {port}: another endpoint already has this port")
            chosen[index] = _take(options.host, port, option, held, bound)
    return Ports(http=chosen[0], grpc=chosen[1], metrics=chosen[2])


def _take(host: str, port: int, option: str, held: contextlib.ExitStack, bound: contextlib.ExitStack) -> int:
    """The port, or a free one for 0. ``held`` gets what other launches see, ``bound`` what the server must not meet."""
    while True:
        found: int = bound.enter_context(_bound(host, port, option)).getsockname()[1]
        name = _hold(host, found)
        if name is not None:
            held.enter_context(name)
            return found
        if port:
            raise BadRequest(
                f"{option} {port}: another Trident server that is starting has it on {host}; give another port, or 0 "
                "for a free one"
            )


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


def _hold(host: str, port: int) -> socket.socket | None:
    """A name for the port that is gone when it is closed; None where another launch has the port."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0{_NAMES}{port}/{host}")
    except OSError as error:
        name.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    others = _holders(port) - {host}
    # Each of two that come at once may see the other, and both give way: none has a port twice.
    if _ANY_ADDRESS in others or (others and host == _ANY_ADDRESS):
        name.close()
        return None
    return name


def _holders(port: int) -> set[str]:
    """The addresses on which launches hold a port."""
    # The kernel shows an abstract name, which starts with a zero byte, with an @.
    names = (line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text(errors="replace").splitlines())
    prefix = f"@{_NAMES}{port}/"
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
