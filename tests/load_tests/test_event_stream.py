"""The load test's HTTP stream, against a server that answers as Triton does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from event_stream import EventStream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


class Peer:
    """One connection's server side: what it was sent, and whether the client has hung up."""

    def __init__(self, answer: bytes, *, stay: bool) -> None:
        self.request = b""
        self.left = threading.Event()
        self._answer, self._stay = answer, stay
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection, self._socket:
            while b"}" not in self.request:
                self.request += connection.recv(4096)
            connection.sendall(self._answer)
            if self._stay and connection.recv(1) == b"":
                self.left.set()


@contextmanager
def served(answer: bytes, *, stay: bool = False) -> Iterator[Peer]:
    peer = Peer(answer, stay=stay)
    yield peer
    peer.thread.join(timeout=5)


def test_events_come_in_order_however_they_are_cut() -> None:
    whole = event(text_output="a", num_output_tokens=1) + event(text_output="b", num_output_tokens=2)
    body = chunk(whole[:20]) + chunk(whole[20:]) + chunk(b"")
    fields = {"text_input": "x"}
    with (
        served(HEAD + body) as peer,
        EventStream(peer.address, "llm", fields, timeout=5, receive_buffer=4096) as stream,
    ):
        assert [found["text_output"] for found in stream] == ["a", "b"]
    head, _, sent = peer.request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v2/models/llm/generate_stream HTTP/1.1\r\n")
    assert json.loads(sent) == fields


def test_leaving_hangs_up() -> None:
    with served(HEAD + chunk(event(text_output="a")), stay=True) as peer:
        with EventStream(peer.address, "llm", {}, timeout=5) as stream:
            assert next(iter(stream)) == {"text_output": "a"}
            assert not peer.left.is_set()
        assert peer.left.wait(5)


def test_a_refusal_is_an_event() -> None:
    body = b'{"error": "no"}'
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(answer) as peer, EventStream(peer.address, "llm", {}, timeout=5) as stream:
        (found,) = stream
    assert "400" in found["error"] and "no" in found["error"]


@pytest.mark.parametrize("answer", [HEAD + b"20\r\ndata: {", HEAD + chunk(b"data: {\n\n") + chunk(b"")])
def test_a_stream_that_breaks_is_an_error(answer: bytes) -> None:
    with (
        served(answer) as peer,
        EventStream(peer.address, "llm", {}, timeout=5) as stream,
        pytest.raises(ConnectionError, match="broke"),
    ):
        list(stream)


def test_no_answer_is_an_error() -> None:
    with served(b"") as peer, pytest.raises(ConnectionError, match=r"no HTTP answer|reset"):
        EventStream(peer.address, "llm", {}, timeout=5)
