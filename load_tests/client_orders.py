"""What all client processes of a ClientPool have in common: orders on standard input, and the reports they end with.

Orders are JSON lines: prompts and their numbers of new tokens, answered with ``{"prepared": n}``; then a time of the
monotonic clock, at which the client sends all requests, answered with a report. While requests run a client only notes
when which bytes came; it reads them when all have ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

Prepared = TypeVar("Prepared")
REQUEST_SECONDS = 600.0
"""After this long a request counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One request as its client saw it. Times are those of the monotonic clock."""

    submitted: float
    first_token: float
    """When the first response with a token came."""
    first_text: float
    """When the first text came: later, where the first token is part of a character."""
    ended: float
    """When the last response came."""
    output_tokens: int
    responses: int
    error: str = ""
    """Why the request failed; empty when it did not."""


@dataclass(frozen=True)
class Received:
    """What came in answer to one request: times of arrival with raw bytes, and the error that ended it."""

    submitted: float
    arrivals: list[tuple[float, bytes]]
    error: str


class Client(Protocol[Prepared]):
    """How requests are made, sent and read over one protocol."""

    async def prepare(self, prompt: str, new_tokens: int) -> Prepared:
        """All that can be done before the start."""
        ...

    async def ask(self, request: Prepared) -> Received:
        """Send one request and note what comes back, to its end."""
        ...

    def read(self, received: Received) -> Stream:
        """Count the tokens. An error in what came is the stream's."""
        ...


async def serve_orders(client: Client[Prepared]) -> None:
    """Carry out orders until standard input ends."""
    while line := sys.stdin.readline():
        say(await _carry_out(client, json.loads(line)))


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _carry_out(client: Client[Prepared], order: dict[str, Any]) -> dict[str, Any]:
    counts = order["new_tokens"]
    requests = [await client.prepare(prompt, count) for prompt, count in zip(order["prompts"], counts, strict=True)]
    say({"prepared": len(requests)})
    await asyncio.sleep(json.loads(sys.stdin.readline()) - time.monotonic())
    began, cpu_began = time.monotonic(), time.process_time()
    calls: list[Awaitable[Received]] = [client.ask(request) for request in requests]
    answers = await asyncio.gather(*calls)
    cpu_seconds, seconds = time.process_time() - cpu_began, time.monotonic() - began
    streams = [_checked(client.read(received), count) for received, count in zip(answers, counts, strict=True)]
    return {"streams": [asdict(stream) for stream in streams], "cpu_seconds": cpu_seconds, "seconds": seconds}


def _checked(stream: Stream, new_tokens: int) -> Stream:
    """A request that ended with another number of tokens than asked for failed."""
    if stream.error or stream.output_tokens == new_tokens:
        return stream
    error = f"{stream.output_tokens} output tokens instead of {new_tokens}"
    return Stream(**{**asdict(stream), "error": error})
