"""A client of Triton's generate_stream that owns its socket: it can read as slowly as it likes, and hang up."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import Any

_DATA = b"data: "


class EventStream:
    """One answer as server-sent events. Leaving the ``with`` statement before its end closes the connection, which
    cancels the request. Raises ``OSError`` when the connection breaks."""

    def __init__(
        self,
        address: str,
        model: str,
        fields: Mapping[str, Any],
        *,
        timeout: float,
        receive_buffer: int | None = None,
    ) -> None:
        """``address``: host:port; ``timeout``: seconds that may pass without news; ``receive_buffer``: bytes that the
        kernel keeps for the reader, beyond which the server has to wait."""
        host, _, port = address.rpartition(":")
        body = json.dumps(fields).encode()
        head = (
            f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(*found[:3])
        try:
            self._socket.settimeout(timeout)
            if receive_buffer is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self._socket.connect(found[4])
            self._socket.sendall(head.encode() + body)
            self._response = HTTPResponse(self._socket, method="POST")
            self._response.begin()
        except HTTPException as error:
            self._socket.close()
            raise ConnectionError(f"no HTTP answer: {error!r}") from None
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._response.close()
        self._socket.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events as they come; one with the field ``error`` when the server refuses."""
        if self._response.status != 200:
            yield {"error": f"HTTP status {self._response.status}: {self._response.read()[:300]!r}"}
            return
        try:
            while line := self._response.readline():
                if line.startswith(_DATA):
                    yield json.loads(line[len(_DATA) :])
        except (HTTPException, ValueError) as error:
            raise ConnectionError(f"the stream of events broke: {error!r}") from None
