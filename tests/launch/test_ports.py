"""Choice of the endpoints' ports."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.launch.port_taker import PortTaker, options, two_takers
from trident_llm.errors import BadRequest
from trident_llm.launch.options import Options
from trident_llm.launch.ports import Ports, hold_ports


def choose(wanted: Options) -> Ports:
    """Ports that nobody holds any more."""
    with hold_ports(wanted) as ports:
        return ports


@pytest.fixture
def takers() -> Iterator[tuple[PortTaker, PortTaker]]:
    with two_takers() as found:
        yield found


def test_zero_picks_three_different_free_ports() -> None:
    ports = choose(options())
    assert len({ports.http, ports.grpc, ports.metrics, 0}) == 4


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(BadRequest, match=f"--grpc-port {port}: in use on 127.0.0.1"):
            choose(options(grpc_port=port))
    assert choose(options(grpc_port=port)).grpc == port


def test_two_endpoints_cannot_share_a_port() -> None:
    port = choose(options()).http
    with pytest.raises(BadRequest, match=f"--metrics-port {port}: another endpoint"):
        choose(options(http_port=port, metrics_port=port))


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(BadRequest, match=r"--host 192\.0\.2\.1: not an address of this machine"):
        choose(options("192.0.2.1"))


def test_of_two_launches_one_gets_a_port(takers: tuple[PortTaker, PortTaker]) -> None:
    """At the same moment, before either has a server that listens there."""
    for _ in range(50):
        port = choose(options()).http
        for taker in takers:
            taker.ask(f"0 {port} 0 127.0.0.1")
        answers = [taker.answer() for taker in takers]
        (refusal,) = [answer for answer in answers if isinstance(answer, str)]
        (ports,) = [answer for answer in answers if isinstance(answer, list)]
        assert ports[1] == port and f"--grpc-port {port}: " in refusal and "or 0 for a free one" in refusal
        for taker in takers:
            taker.ask("release")
            assert taker.answer() is None


def test_free_picks_of_two_launches_differ(takers: tuple[PortTaker, PortTaker]) -> None:
    """So many that some would be the same by chance."""
    held: list[int] = []
    for _ in range(150):
        for taker in takers:
            taker.ask("0 0 0 127.0.0.1")
        for taker in takers:
            answer = taker.answer()
            assert isinstance(answer, list)
            held += answer
    assert len(set(held)) == len(held) == 900


def test_ports_are_held_until_the_context_ends() -> None:
    refusal = "--http-port .*: another Trident server that is starting has it on 127.0.0.1; give another port, or 0"
    with hold_ports(options()) as ports, pytest.raises(BadRequest, match=refusal):
        choose(options(http_port=ports.metrics))
    assert choose(options(http_port=ports.metrics)).http == ports.metrics


def test_a_port_is_held_on_its_address() -> None:
    with hold_ports(options()) as ports:
        assert choose(options("127.0.0.2", http_port=ports.http)).http == ports.http
        with pytest.raises(BadRequest, match=f"--http-port {ports.http}: another Trident server"):
            choose(options("0.0.0.0", http_port=ports.http))
    with hold_ports(options("0.0.0.0")) as ports, pytest.raises(BadRequest, match=f"--http-port {ports.http}: another"):
        choose(options(http_port=ports.http))


def test_a_launch_that_was_killed_holds_nothing(takers: tuple[PortTaker, PortTaker]) -> None:
    first, second = takers
    first.ask("0 0 0 127.0.0.1")
    ports = first.answer()
    assert isinstance(ports, list)
    first.kill()
    second.ask(" ".join(map(str, [*ports, "127.0.0.1"])))
    assert second.answer() == ports
