"""Choice of the endpoints' ports."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from tests.launch.helpers import ECHO_REPOSITORY
from trident_llm.errors import BadRequest
from trident_llm.launch.options import Options, parse_options
from trident_llm.launch.ports import choose_ports


def options(**ports: int) -> Options:
    base = parse_options([f"--model-repository={ECHO_REPOSITORY}"])
    return dataclasses.replace(base, **{"http_port": 0, "grpc_port": 0, "metrics_port": 0, **ports})


def test_zero_picks_three_different_free_ports() -> None:
    ports = choose_ports(options())
    assert len({ports.http, ports.grpc, ports.metrics, 0}) == 4


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(BadRequest, match=f"--grpc-port {port}: in use on 127.0.0.1"):
            choose_ports(options(grpc_port=port))
    assert choose_ports(options(grpc_port=port)).grpc == port


def test_two_endpoints_cannot_share_a_port() -> None:
    port = choose_ports(options()).http
    with pytest.raises(BadRequest, match=f"--metrics-port {port}: another endpoint"):
        choose_ports(options(http_port=port, metrics_port=port))


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(BadRequest, match=r"--host 192\.0\.2\.1: not an address of this machine"):
        choose_ports(dataclasses.replace(options(), host="192.0.2.1"))
