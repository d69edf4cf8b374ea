"""Where servers are: addresses, and DNS names of which every address is a server. Opens no connection to any."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from trident_client.wire import check_url

_DNS = "dns:"


@dataclass(frozen=True)
class Place:
    """``is_name``: all addresses of the host are servers, as those of a headless service in Kubernetes."""

    url: str
    is_name: bool


LookUp = Callable[[Place], Awaitable[list[str]]]
"""The addresses of a name, as host:port. Raises ``OSError``."""


def read_places(texts: Sequence[str]) -> list[Place]:
    """Places from ``HOST:PORT`` and ``dns:HOST:PORT``, several in one text separated by commas.

    Raises ``BadRequest``.
    """
    return [_place(part.strip()) for text in texts for part in text.split(",")]


async def look_up(place: Place) -> list[str]:
    """Asks the system's resolver, each time anew. Raises ``OSError``."""
    host, _, port = place.url.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host!r} is no name of a host: {error}") from None
    return sorted({_url(str(address[0]), port) for *_, address in found})


def _place(text: str) -> Place:
    # A server may be called dns, too.
    is_name = text.startswith(_DNS) and text.count(":") > 1
    return Place(check_url(text.removeprefix(_DNS) if is_name else text), is_name)


def _url(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
