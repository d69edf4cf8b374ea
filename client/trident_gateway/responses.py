"""HTTP responses that end their work when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

MAX_BODY_BYTES = 16 * 2**20
_MAX_WAITING_BYTES = 2**16
_GATHERING_TURNS = 2
"""Turns of the event loop between the first event and the write: what waits in gRPC comes through a thread of its own,
so it is there some turns after it was asked for. Turns are long only where much else is to be done in them."""
_CLIENT_GONE = 499
Result = TypeVar("Result")


async def read_body(request: Request) -> bytes:
    """The body, bounded. Raises ``ApiError``."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return bytes(data)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client leaves. The body must have been read."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(_CLIENT_GONE, "the client has left")
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Server-sent events, ``first`` and those of a generator of bytes, which is closed when the client leaves.

    Events that wait together are sent together: a write to a socket costs as much as reading a token from gRPC.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting = _Waiting()
        read = asyncio.create_task(waiting.read(self._events))
        task, gone = asyncio.create_task(self._send(send, waiting, read)), asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await _end(task, read, gone)

    async def _send(self, send: Send, waiting: _Waiting, read: asyncio.Task[None]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = self._first or await waiting.take()
        while events:
            await send({"type": "http.response.body", "body": events, "more_body": True})
            events = await waiting.take()
        await read  # an error there must not look like the end
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Waiting:
    """Events between the task that reads them and the one that sends them."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._num_bytes = 0
        self._ended = False
        self._news = asyncio.Event()
        self._taken = asyncio.Event()

    async def read(self, events: AsyncGenerator[bytes, None]) -> None:
        """Read all ``events``, at the pace of a slow client once ``_MAX_WAITING_BYTES`` wait for it."""
        try:
            async with aclosing(events):
                async for event in events:
                    self._events.append(event)
                    self._num_bytes += len(event)
                    self._news.set()
                    if self._num_bytes > _MAX_WAITING_BYTES:
                        self._taken.clear()
                        await self._taken.wait()
        finally:
            self._ended = True
            self._news.set()

    async def take(self) -> bytes:
        """What waits, once there is something; empty after the last."""
        while not (self._num_bytes or self._ended):
            self._news.clear()
            await self._news.wait()
            for _ in range(_GATHERING_TURNS):
                await asyncio.sleep(0)
        events = b"".join(self._events)
        self._events.clear()
        self._num_bytes = 0
        self._taken.set()
        return events


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
