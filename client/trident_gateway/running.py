"""How many requests run on which server, counted by all workers of a gateway together. Knows addresses and numbers."""

from __future__ import annotations

import ctypes
import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from multiprocessing.context import BaseContext
from typing import Any

_ROW = 1024
_COUNT_BITS = 16
_MOST = 2**_COUNT_BITS - 1
Memory = Any
"""A ctypes array that ``shared_memory`` made; it travels to a process as one of its arguments."""


def shared_memory(context: BaseContext, num_workers: int) -> Memory:
    """Memory for ``num_workers`` workers, all of whose counts are 0. It has no name that could be left behind."""
    return context.RawArray(ctypes.c_uint64, num_workers * _ROW)


def clear(memory: Memory, worker: int) -> None:
    """Let the counts of a worker that has ended be 0."""
    _words(memory)[worker * _ROW : (worker + 1) * _ROW] = memoryview(bytes(8 * _ROW)).cast("Q")


class Running:
    """Counts of one worker, which it writes, and those of the others, which it reads.

    Each worker has a row of 64-bit words: how many of the others it has used, and in each of them 48 bits of a hash
    of a server's address above 16 bits of a count. A word is read and written whole and has one writer, so there is
    no lock; what another worker changes at this moment may not be seen yet. One worker's requests on more than 1,023
    servers at once would be unknown to others. Without ``memory`` there are no others.
    """

    def __init__(self, memory: Memory | None = None, worker: int = 0) -> None:
        self._words = _words(memory) if memory is not None else memoryview(bytearray(8 * _ROW)).cast("Q")
        self._begin = worker * _ROW
        self._others = [begin for begin in range(0, len(self._words), _ROW) if begin != self._begin]
        self._free = list(range(_ROW - 1, 0, -1))
        self._places: dict[str, int] = {}

    def put(self, url: str, count: int) -> None:
        """This worker has ``count`` requests on the server at ``url``."""
        if url not in self._places:
            if not (count and self._free):
                return
            self._places[url] = self._free.pop()
        place = self._places[url]
        if count:
            self._words[self._begin + place] = _hash(url) << _COUNT_BITS | min(count, _MOST)
            self._words[self._begin] = max(self._words[self._begin], place)
        else:
            self._words[self._begin + place] = 0
            self._free.append(self._places.pop(url))

    def of_all(self, own: Mapping[str, int]) -> dict[str, int]:
        """``own``, this worker's requests by server, with those of other workers on the same servers."""
        others: Counter[int] = Counter()
        for begin in self._others:
            for word in self._words[begin + 1 : begin + 1 + self._words[begin]]:
                others[word >> _COUNT_BITS] += word & _MOST
        return {url: count + others[_hash(url)] for url, count in own.items()}


def _words(memory: Memory) -> memoryview:
    return memoryview(memory).cast("B").cast("Q")


@lru_cache(1024)
def _hash(url: str) -> int:
    return int.from_bytes(hashlib.blake2b(url.encode(), digest_size=6).digest(), "little")
