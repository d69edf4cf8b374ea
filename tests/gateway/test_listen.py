"""Sockets of workers: how even connections spread, what is refused, and what waits."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from trident_gateway import cores
from trident_gateway.listen import listen


@contextlib.contextmanager
def listening(host: str, port: int, num_workers: int) -> Iterator[list[list[socket.socket]]]:
    sockets = listen(host, port, num_workers)
    try:
        yield sockets
    finally:
        for listener in (listener for own in sockets for listener in own):
            listener.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def accepted(listener: socket.socket) -> int:
    count = 0
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def test_connections_spread_over_workers() -> None:
    port = free_port()
    with listening("127.0.0.1", port, 4) as sockets, contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        shares = [accepted(own[0]) for own in sockets]
    assert sum(shares) == 400
    assert all(50 < share < 150 for share in shares), shares  # 100, and 5.8 standard deviations


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", [1, 2])
def test_a_port_is_one_gateways(first: int, second: int) -> None:
    port = free_port()
    with listening("127.0.0.1", port, first):
        with pytest.raises(OSError, match="in use"):
            listen("127.0.0.1", port, second)
        with socket.create_connection(("127.0.0.1", port), 5):
            pass
    with listening("127.0.0.1", port, second):
        pass


def test_a_failure_leaves_nothing_open() -> None:
    """localhost may have two addresses; where the second is taken, the first is free again."""
    port = free_port()
    addresses = {found[4] for found in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    for family, *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
        with socket.create_server(address, family=family):
            with pytest.raises(OSError, match="in use"):
                listen("localhost", port, 2)
            for other in addresses - {address}:
                socket.create_server(other, family=socket.AF_INET if len(other) == 2 else socket.AF_INET6).close()


def test_addresses_that_this_machine_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    lacking = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [lacking, here])
    with listening("name", port, 2) as sockets:
        assert [[each.getsockname() for each in own] for own in sockets] == [[("127.0.0.1", port)]] * 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [lacking])
    with pytest.raises(OSError, match="assign"):
        listen("name", port, 2)


@pytest.mark.parametrize(
    ("affinity", "limit", "workers"),
    [
        (1, None, 1),
        (7, None, 1),
        (8, None, 2),
        (16, "max 100000", 4),
        (256, None, 8),
        (64, "800000 100000", 2),
        (64, "150000 100000", 1),
        (4, "3200000 100000", 1),
    ],
)
def test_workers_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, affinity: int, limit: str | None, workers: int
) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(cores, "CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        cores.CPU_LIMIT.write_text(limit + "\n")
    assert cores.default_workers() == workers
