"""Which server the requests of a conversation go to: rendezvous hashing with bounded loads. Knows names and counts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

LOAD_FACTOR = 1.25
FEW_REQUESTS = 4
"""So many run on any server: a step of 4 takes 14% longer than a step of one (H100, docs/performance.md), while a
prompt of 2,000 tokens whose prefix is cached elsewhere takes six times as long to its first token."""


def key_of(model: str, cache_salt: str, beginning: str) -> bytes:
    """What decides about the prefix cache: requests that differ in one of the three share no cached blocks worth
    looking for. 32 bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (model, cache_salt, beginning):
        data = part.encode("utf-8", "replace")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def ranked(servers: Iterable[str], key: bytes) -> list[str]:
    """``servers``, the best for ``key`` (at most 64 bytes) first; the order in which they are given does not matter.

    Rendezvous hashing, also called highest random weight (Thaler and Ravishankar, "Using name-based mappings to
    increase hit rates", IEEE/ACM Transactions on Networking 6(1), 1998): server and key are hashed together, and the
    largest hash wins. Any two servers keep their order whatever others there are, so one that leaves gives up only
    its own keys, evenly to the others, and one that comes takes only what it will keep: about 1/n of all.
    """
    return sorted(servers, key=lambda server: (_weight(server, key), server), reverse=True)


def most_requests(running: int, num_servers: int, load_factor: float) -> int:
    """How many requests a server may run, a new one included, while ``running`` run on ``num_servers`` servers.

    ``ceil(c (m + 1) / n)`` as in consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA 2018,
    arXiv:1608.01350), but at least ``FEW_REQUESTS``. With ``load_factor`` c of at least 1 some server always has
    room: n times the bound is more than m.
    """
    return max(FEW_REQUESTS, math.ceil(load_factor * (running + 1) / num_servers))


def _weight(server: str, key: bytes) -> bytes:
    return hashlib.blake2b(server.encode(), key=key, digest_size=8).digest()
