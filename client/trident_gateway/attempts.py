"""One generation, asked of one server after another until one begins to answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from trident_client import Chunk, EngineFailed, NotFound, Overloaded, TridentError
from trident_client.wire import Message

from .upstreams import Upstream, Upstreams

_NO_CONNECTION = "no connection"
_DEADLY = "while it served this request"
"""In the error for a request that has ended engine processes: it must not go through all servers."""


async def generate(
    upstreams: Upstreams, model: str, key: bytes, prompt: str | Sequence[Message], options: Mapping[str, Any]
) -> AsyncGenerator[Chunk, None]:
    """Chunks from the first server that begins to answer; nothing is asked again once a chunk has come.

    A server that has no room, cannot be reached or no longer has the model is passed over for the next in the order
    of ``key``. One that breaks is, too, but only once: what breaks a second one may well be the request.
    Raises the last server's ``TridentError``.
    """
    tried: set[str] = set()
    failures: list[TridentError] = []
    while (upstream := upstreams.choose(model, key, tried)) is not None:
        tried.add(upstream.url)
        started = False
        try:
            async with aclosing(_ask(upstream, model, prompt, options)) as chunks:
                async for chunk in chunks:
                    started = True
                    yield chunk
            return
        except TridentError as error:
            if started or not _may_go_on(error, failures):
                raise
            if isinstance(error, Overloaded) and error.message.startswith(_NO_CONNECTION):
                upstream.ready = False  # until it is asked again, so that others do not try it first
            failures.append(error)
    raise failures[-1] if failures else Overloaded("no server is known that could answer; retry after 2 s")


async def _ask(
    upstream: Upstream, model: str, prompt: str | Sequence[Message], options: Mapping[str, Any]
) -> AsyncGenerator[Chunk, None]:
    merged = {**options, **upstream.models[model]}
    with upstream.carrying():
        async with aclosing(upstream.client.generate(prompt, **merged)) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason == "error":
                    raise EngineFailed("the engine could not finish the answer")
                yield chunk


def _may_go_on(error: TridentError, failures: Sequence[TridentError]) -> bool:
    if isinstance(error, Overloaded | NotFound):
        return True
    broken = any(isinstance(failure, EngineFailed) for failure in failures)
    return isinstance(error, EngineFailed) and _DEADLY not in error.message and not broken
