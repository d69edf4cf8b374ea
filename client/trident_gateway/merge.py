"""Several streams of chunks as one, each chunk with the number of its stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from trident_client import Chunk

_Item = tuple[int, Chunk] | Exception | None
_WAITING = 64
"""Chunks that wait for a slow reader; beyond that the streams wait."""


async def merged(streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks as they come. The first error ends all streams, as does closing."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for chunk in only:
                yield 0, chunk
        return
    queue: asyncio.Queue[_Item] = asyncio.Queue(_WAITING)
    tasks = [asyncio.create_task(_read(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await queue.get()
            if item is None:
                open_streams -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(number: int, stream: AsyncGenerator[Chunk, None], queue: asyncio.Queue[_Item]) -> None:
    try:
        async with aclosing(stream):
            async for chunk in stream:
                await queue.put((number, chunk))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
