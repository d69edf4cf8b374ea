"""Asks the Triton server in what state a model is, over its own HTTP port, which its command line tells.

Nobody tells a model that it is being unloaded before its last request has ended, but the index of the repository says
so at once. Knows nothing of doors.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ASK_TIMEOUT = 1.0
"""Seconds after which the server does not answer."""
REFUSALS = (http.HTTPStatus.FORBIDDEN, http.HTTPStatus.NOT_FOUND)
"""What a server answers that will not say later either: who may unload models has a key."""


class Address(NamedTuple):
    host: str
    port: int


def arguments_of(pid: int) -> list[str]:
    """The command line of the process ``pid`` after the program; none if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[1:-1]
    except OSError:
        return []


def index_address(arguments: Sequence[str]) -> Address | None:
    """Where a server with these arguments tells of its models. None where models stay as long as the server does,
    and where another server may answer in its place, or none."""
    try:
        given, _ = _parser().parse_known_args(list(arguments))
        port = int(given.http_port)
    except (_NotUnderstood, ValueError):
        return None
    if given.model_control_mode == "none" or not _is_true(given.allow_http) or _is_true(given.reuse_http_port):
        return None
    return Address(_reachable(given.http_address), port)


class ServerIndex:
    """The index of one server's model repository."""

    def __init__(self, address: Address | None) -> None:
        self._address = address

    def state_of(self, model: str, version: str) -> str:
        """READY, LOADING, UNLOADING or UNAVAILABLE; empty when the server does not say. Takes about a millisecond, and
        ``ASK_TIMEOUT`` at most."""
        if self._address is None:
            return ""
        # Not kept open: a server that is told to end waits for connections.
        connection = http.client.HTTPConnection(*self._address, timeout=ASK_TIMEOUT)
        try:
            connection.request("POST", "/v2/repository/index", body="{}", headers={"Connection": "close"})
            answer = connection.getresponse()
            if answer.status in REFUSALS:
                self._address = None
            if answer.status != http.HTTPStatus.OK:
                return ""
            return _state(json.loads(answer.read()), model, version)
        except (OSError, http.client.HTTPException, ValueError):
            return ""
        finally:
            connection.close()


def _state(index: object, model: str, version: str) -> str:
    for entry in index if isinstance(index, list) else ():
        if isinstance(entry, dict) and (entry.get("name"), entry.get("version")) == (model, version):
            return str(entry.get("state", ""))
    return ""


class _NotUnderstood(Exception):
    """The server reads this command line otherwise."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _NotUnderstood(message)


def _parser() -> _Parser:
    """The server's own options that matter, with its defaults; options may be abbreviated there too."""
    parser = _Parser(add_help=False)
    parser.add_argument("--http-port", default="8000")
    parser.add_argument("--http-address", default="0.0.0.0")
    parser.add_argument("--allow-http", default="true")
    parser.add_argument("--reuse-http-port", default="false")
    parser.add_argument("--model-control-mode", default="none")
    return parser


def _is_true(value: str) -> bool:
    return value.lower() in ("true", "1")


def _reachable(host: str) -> str:
    """The address under which this machine reaches a server that listens on ``host``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host
