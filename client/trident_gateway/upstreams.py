"""The servers behind the gateway: which are ready, which models each has, and which one a conversation goes to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from trident_client import AsyncTridentClient, Chunk, EngineFailed, Overloaded, RetryPolicy, TridentError
from trident_client.wire import Message

from .errors import unknown_model

BASE_MODEL = "llm"
_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 2.0


class Upstream:
    """One server. ``models``: names that requests may give -> the server's options that mean them."""

    def __init__(self, url: str, admin_token: str) -> None:
        self.client = AsyncTridentClient(url, admin_token=admin_token, retry=RetryPolicy(retries=0))
        self.ready = False
        self.models: dict[str, dict[str, Any]] = {BASE_MODEL: {"xlora": False}}

    async def refresh(self) -> None:
        """Ask for readiness and adapters; without an answer about adapters only the base model has a name."""
        self.ready = await self.client.is_ready(_ANSWER_SECONDS)
        if not self.ready:
            return
        try:
            listed = await self.client.list_adapters(timeout=_ANSWER_SECONDS)
        except TridentError:
            listed = {}
        names = [entry["name"] for kind in ("adapters", "mixes") for entry in listed.get(kind, [])]
        self.models = {**{name: {"adapter": name} for name in names}, BASE_MODEL: {"xlora": False}}


class Upstreams:
    """All servers. ``watch`` keeps what is known of them fresh."""

    def __init__(self, urls: Sequence[str], admin_token: str) -> None:
        self.all = [Upstream(url, admin_token) for url in urls]

    @property
    def ready(self) -> bool:
        return any(upstream.ready for upstream in self.all)

    def models(self) -> list[str]:
        """The base model, then the names of adapters and mixes."""
        names = {name for upstream in self.all for name in upstream.models}
        return [BASE_MODEL, *sorted(names - {BASE_MODEL})]

    async def refresh(self) -> None:
        await asyncio.gather(*(upstream.refresh() for upstream in self.all))

    async def watch(self) -> None:
        """Refresh until cancelled."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self.refresh()

    async def close(self) -> None:
        await asyncio.gather(*(upstream.client.close() for upstream in self.all))

    async def choose(self, model: str, beginning: str) -> list[Upstream]:
        """The servers that have ``model``, best first: ready ones before others, then by rendezvous hash, so that
        a conversation stays where its prefix is cached and a server that leaves moves only its own conversations.

        Raises ``ApiError`` 404 when no server has the model, also after asking again.
        """
        if model not in self.models():
            await self.refresh()
        having = [upstream for upstream in self.all if model in upstream.models]
        if not having:
            raise unknown_model(model, self.models())
        if len(having) == 1:
            return having
        ready = [upstream for upstream in having if upstream.ready] or having
        return sorted(ready, key=lambda upstream: _weight(upstream.client.url, beginning), reverse=True)


async def generate(
    upstreams: Sequence[Upstream], model: str, prompt: str | Sequence[Message], options: dict[str, Any]
) -> AsyncGenerator[Chunk, None]:
    """Chunks from the first upstream that takes the request; another is asked only before any output has come."""
    for number, upstream in enumerate(upstreams):
        merged = {**options, **upstream.models.get(model, {"adapter": model})}
        started = False
        try:
            async with aclosing(upstream.client.generate(prompt, **merged)) as chunks:
                async for chunk in chunks:
                    started = True
                    if chunk.finish_reason == "error":
                        raise EngineFailed("the engine could not finish the answer")
                    yield chunk
            return
        except Overloaded:
            if started or number == len(upstreams) - 1:
                raise


def _weight(url: str, beginning: str) -> bytes:
    return hashlib.blake2b(f"{url}\n{beginning}".encode("utf-8", "replace"), digest_size=8).digest()
