"""The servers behind the gateway: which there are, which are ready, which models each has, and which one is asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from typing import Any

from trident_client import AsyncTridentClient, RetryPolicy, TridentError

from .affinity import LOAD_FACTOR, most_requests, ranked
from .places import LookUp, Place, look_up
from .running import Running

BASE_MODEL = "llm"
_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
_LOOK_UP_SECONDS = 5.0
"""As long as the DNS of a Kubernetes cluster lets its answers be kept, unless told otherwise."""
_log = logging.getLogger(__name__)


class Upstream:
    """One server. ``models``: names that requests may give -> the server's options that mean them."""

    def __init__(self, url: str, admin_token: str, shared: Running) -> None:
        self.client = AsyncTridentClient(url, admin_token=admin_token, retry=RetryPolicy(retries=0))
        self.url = url
        self.ready = False
        self.running = 0
        """Requests of this process."""
        self._shared = shared
        self.models: dict[str, dict[str, Any]] = {BASE_MODEL: {"xlora": False}}

    @contextlib.contextmanager
    def carrying(self) -> Iterator[None]:
        """Counts a request as running."""
        self.running += 1
        self._shared.put(self.url, self.running)
        try:
            yield
        finally:
            self.running -= 1
            self._shared.put(self.url, self.running)

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

    def __init__(
        self,
        places: Sequence[Place],
        admin_token: str = "",
        *,
        load_factor: float = LOAD_FACTOR,
        look_up: LookUp = look_up,
        running: Running | None = None,
    ) -> None:
        """``running``: this worker's and others' counts; without it there are no other workers."""
        self._running = running or Running()
        self._admin_token = admin_token
        self._load_factor = load_factor
        self._look_up = look_up
        self._urls = {place: [] if place.is_name else [place.url] for place in places}
        self._by_url: dict[str, Upstream] = {}
        self._leaving: list[Upstream] = []
        self._not_found: set[Place] = set()
        self._put_in_place()

    @property
    def all(self) -> list[Upstream]:
        return list(self._by_url.values())

    @property
    def ready(self) -> bool:
        return any(upstream.ready for upstream in self.all)

    def models(self) -> list[str]:
        """The base model, then the names of adapters and mixes."""
        names = {name for upstream in self.all for name in upstream.models}
        return [BASE_MODEL, *sorted(names - {BASE_MODEL})]

    async def refresh(self) -> None:
        """Ask every server, and close what has left and carries no request any more."""
        await asyncio.gather(*(upstream.refresh() for upstream in self.all))
        idle = [upstream for upstream in self._leaving if not upstream.running]
        self._leaving = [upstream for upstream in self._leaving if upstream.running]
        await asyncio.gather(*(upstream.client.close() for upstream in idle))

    async def find(self) -> None:
        """Look names up. One that has no answer keeps its addresses: whether they are ready is asked anyway."""
        named = [place for place in self._urls if place.is_name]
        found = await asyncio.gather(*(self._look_up(place) for place in named), return_exceptions=True)
        for place, urls in zip(named, found, strict=True):
            if isinstance(urls, OSError):
                if place not in self._not_found:
                    _log.warning("%s cannot be looked up: %s", place.url, urls)
                self._not_found.add(place)
            elif isinstance(urls, BaseException):
                raise urls
            else:
                self._urls[place] = urls
                self._not_found.discard(place)
        await asyncio.gather(*(upstream.refresh() for upstream in self._put_in_place()))

    async def watch(self) -> None:
        """Find and refresh until cancelled."""
        tasks = [_repeat(self.refresh, _POLL_SECONDS)]
        if any(place.is_name for place in self._urls):
            tasks.append(_repeat(self.find, _LOOK_UP_SECONDS))
        await asyncio.gather(*tasks)

    async def close(self) -> None:
        await asyncio.gather(*(upstream.client.close() for upstream in [*self.all, *self._leaving]))

    async def knows(self, model: str) -> bool:
        """Whether a server has ``model``, also after asking again. Unknown as long as none is ready: then True."""
        if model not in self.models():
            await self.refresh()
        return model in self.models() or not self.ready

    def choose(self, model: str, key: bytes, tried: Container[str]) -> Upstream | None:
        """The server to ask next, not one of ``tried`` (their urls); None when no other has ``model``.

        Ready ones come before others. Of these it is the first of the order by ``key`` that has room. Workers that
        choose at the same moment may give a server one request each beyond that.
        """
        having = [upstream for upstream in self.all if model in upstream.models and upstream.url not in tried]
        ready = {upstream.url: upstream for upstream in having if upstream.ready}
        servers = ready or {upstream.url: upstream for upstream in having}
        if not servers:
            return None
        running = self._running.of_all({url: upstream.running for url, upstream in servers.items()})
        most = most_requests(sum(running.values()), len(servers), self._load_factor)
        return next(servers[url] for url in ranked(servers, key) if running[url] < most)

    def _put_in_place(self) -> list[Upstream]:
        """Let the servers be those of ``_urls``, and return those that have come.

        What has left finishes its requests, and is known again if it comes back before that.
        """
        urls = dict.fromkeys(url for found in self._urls.values() for url in found)
        known = {upstream.url: upstream for upstream in self._leaving} | self._by_url
        come = [url for url in urls if url not in self._by_url]
        known.update((url, Upstream(url, self._admin_token, self._running)) for url in come if url not in known)
        self._leaving = [upstream for url, upstream in known.items() if url not in urls]
        self._by_url = {url: known[url] for url in urls}
        return [known[url] for url in come]


async def _repeat(action: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await action()
