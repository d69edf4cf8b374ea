"""Where a server tells of its models, and what is made of its answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from trident_llm.server import server_index
from trident_llm.server.server_index import Address, ServerIndex, arguments_of, index_address

EXPLICIT = "--model-control-mode=explicit"


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ([EXPLICIT], ("127.0.0.1", 8000)),
        (["--model-control-mode", "poll", "--http-port", "9000"], ("127.0.0.1", 9000)),
        ([EXPLICIT, "--http-port=1", "--http-port=2", "--http-address=0.0.0.0"], ("127.0.0.1", 2)),
        ([EXPLICIT, "--http-address=::"], ("::1", 8000)),
        ([EXPLICIT, "--http-address=10.0.0.7", "--load-model=llm"], ("10.0.0.7", 8000)),
        ([EXPLICIT, "--http-address=localhost", "--allow-http=1"], ("localhost", 8000)),
        ([], None),
        (["--model-control-mode=none", "--http-port=9000"], None),
        ([EXPLICIT, "--allow-http=false"], None),
        ([EXPLICIT, "--allow-http", "0"], None),
        ([EXPLICIT, "--reuse-http-port=true"], None),
        ([EXPLICIT, "--http-port=many"], None),
        ([EXPLICIT, "--http-port"], None),
        ([EXPLICIT, "--http=1"], None),
    ],
)
def test_the_address_is_what_the_server_was_started_with(
    arguments: list[str], address: tuple[str, int] | None
) -> None:
    assert index_address(["--model-repository=/models", *arguments, "--log-verbose=0"]) == address


def test_command_lines_are_those_of_processes() -> None:
    code = "import sys; print('begun', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "--http-port=1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert arguments_of(process.pid) == command[1:]
    assert arguments_of(2**22 + 1) == []


class Handler(BaseHTTPRequestHandler):
    """Answers with ``status`` and ``body``."""

    status: ClassVar[int] = 200
    body: ClassVar[bytes] = b""
    num_asked: ClassVar[int] = 0

    def do_POST(self) -> None:
        Handler.num_asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status if self.path == "/v2/repository/index" else 500)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Tests are silent."""


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerIndex]:
    monkeypatch.setattr(Handler, "status", 200)
    monkeypatch.setattr(Handler, "num_asked", 0)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ServerIndex(Address("127.0.0.1", server.server_port))
        server.shutdown()


def test_states_are_those_of_the_model_and_its_version(index: ServerIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"name": "llm", "version": "1", "state": "UNLOADING"},
        {"name": "llm", "version": "2", "state": "READY"},
        {"name": "other", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"},
        {"name": "never loaded"},
    ]
    monkeypatch.setattr(Handler, "body", json.dumps(entries).encode())
    asked = (("llm", "1"), ("llm", "2"), ("other", "1"), ("llm", "3"), ("never loaded", "1"))
    assert [index.state_of(*model) for model in asked] == ["UNLOADING", "READY", "UNAVAILABLE", "", ""]


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b"null", b'["llm"]', b'[{"name": "llm", "version": "1"}]', b"\xff"])
def test_an_answer_that_is_not_understood_says_nothing(
    index: ServerIndex, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(Handler, "body", body)
    assert index.state_of("llm", "1") == ""


@pytest.mark.parametrize(("status", "num_asked"), [(403, 1), (404, 1), (400, 2), (503, 2)])
def test_a_server_that_refuses_is_not_asked_again(
    index: ServerIndex, monkeypatch: pytest.MonkeyPatch, status: int, num_asked: int
) -> None:
    monkeypatch.setattr(Handler, "status", status)
    assert [index.state_of("llm", "1") for _ in range(2)] == ["", ""]
    assert Handler.num_asked == num_asked


def test_a_server_that_cannot_be_reached_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_index, "ASK_TIMEOUT", 0.2)
    assert ServerIndex(None).state_of("llm", "1") == ""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        index = ServerIndex(Address(*listener.getsockname()))
        assert index.state_of("llm", "1") == ""
        listener.listen()
        began = time.monotonic()
        assert index.state_of("llm", "1") == ""
        assert 0.1 < time.monotonic() - began < 1.0
