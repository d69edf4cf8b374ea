"""One client process of a ClientPool: streams completions from the OpenAI gateway over HTTP and times their events.

Started as ``python gateway_client.py HOST:PORT``. Each request has a connection of its own, opened before the start, as
clients that keep connections have them.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import dataclass

from client_orders import REQUEST_SECONDS, Received, Stream, say, serve_orders

_EVENT = b"data: {"
_USAGE = re.compile(rb'"completion_tokens": (\d+)')
_SHOWN_BYTES = 300


class Answer(asyncio.Protocol):
    """What comes over one connection, until the server closes it."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


@dataclass(frozen=True)
class Request:
    """``message``: head and body, for an open connection."""

    transport: asyncio.Transport
    answer: Answer
    message: bytes


class HttpClient:
    """Asks the gateway at ``address`` (host:port)."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._host, _, port = address.rpartition(":")
        self._port = int(port)

    async def prepare(self, prompt: str, new_tokens: int) -> Request:
        fields = {"model": "llm", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
                  "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._address}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport, answer = await asyncio.get_running_loop().create_connection(Answer, self._host, self._port)
        return Request(transport, answer, head.encode() + body)

    async def ask(self, request: Request) -> Received:
        error = ""
        submitted = time.monotonic()
        request.transport.write(request.message)
        try:
            await asyncio.wait_for(request.answer.ended, REQUEST_SECONDS)
        except TimeoutError:
            error = f"no end after {REQUEST_SECONDS:.0f} s"
        finally:
            request.transport.abort()
        return Received(submitted, request.answer.arrivals, error)

    def read(self, received: Received) -> Stream:
        whole = b"".join(data for _, data in received.arrivals)
        usage, first = _USAGE.search(whole), _first_event(received)
        error = received.error
        if not error and not (usage and b"data: [DONE]" in whole):
            error = f"the answer is not complete: {whole[:_SHOWN_BYTES]!r} ... {whole[-_SHOWN_BYTES:]!r}"
        return Stream(
            submitted=received.submitted,
            first_token=first,
            first_text=first,
            ended=received.arrivals[-1][0] if received.arrivals else received.submitted,
            output_tokens=int(usage[1]) if usage else 0,
            responses=whole.count(_EVENT),
            error=error,
        )


def _first_event(received: Received) -> float:
    """When the first event was complete; the gateway sends none without text."""
    before = b""
    for arrived, data in received.arrivals:
        before += data
        if _EVENT in before:
            return arrived
    return received.submitted


async def serve(address: str) -> None:
    say({"connected": address})
    await serve_orders(HttpClient(address))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
