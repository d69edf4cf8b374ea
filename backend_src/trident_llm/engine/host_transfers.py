"""HostTransfers: the host tier's memory, and the copies between it and the KV pool, on a stream of their own.

Blocks that leave the pool are gathered on the compute stream, which costs microseconds, and travel to the host beside
the step that overwrites them. Blocks that come back travel beside a step that leaves them alone.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from .host_tier import HostCopies
from .kv_cache import KVCache
from .to_device import send

_GROUP = 16
"""Blocks gathered at once."""
_MAX_GROUPS = 4
"""Groups on their way to the host; the next one waits for the first of them."""
_MEASURED_BLOCKS = 8


@dataclass(frozen=True)
class _Group:
    arrived: torch.cuda.Event
    gathered: tuple[Tensor, ...]
    """Kept until they have arrived: the allocator does not know that another stream reads them."""


class HostTransfers:
    """``num_blocks`` blocks of host memory, pinned where there is a GPU."""

    def __init__(self, kv_cache: KVCache, num_blocks: int) -> None:
        self._pools = kv_cache.pools
        pinned = self._pools[0].device.type == "cuda"
        self._host = tuple(
            torch.zeros(num_blocks, pool.shape[0], *pool.shape[2:], dtype=pool.dtype, pin_memory=pinned)
            for pool in self._pools
        )
        self._stream = torch.cuda.Stream()
        self._leaving: deque[_Group] = deque()
        self._returned: torch.cuda.Event | None = None
        """The end of the copies back that the last call launched."""

    @property
    def num_bytes(self) -> int:
        return sum(host.nbytes for host in self._host)

    def launch(self, copies: HostCopies) -> None:
        """Launch the copies that belong before the next step, which must come after this call on the same stream."""
        compute = torch.cuda.current_stream()
        if self._returned is not None:
            compute.wait_event(self._returned)
            self._returned = None
        for first in range(0, len(copies.out), _GROUP):
            self._copy_out(copies.out[first : first + _GROUP], compute)
        if copies.back:
            # The step in flight may still write to a pool block that has just been given back.
            before = torch.cuda.Event()
            before.record(compute)
            self._stream.wait_event(before)
            with torch.cuda.stream(self._stream):
                self._copy_back(copies.back)
                self._returned = torch.cuda.Event()
                self._returned.record(self._stream)

    def measure_block_seconds(self) -> float:
        """Seconds that a block takes back to the pool. Overwrites blocks of the pool."""
        count = min(_MEASURED_BLOCKS, self._host[0].shape[0], self._pools[0].shape[1])
        copies = HostCopies((), tuple((block, block) for block in range(count)))
        self.launch(copies)
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.launch(copies)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    def _copy_out(self, pairs: tuple[tuple[int, int], ...], compute: torch.cuda.Stream) -> None:
        while self._leaving and (len(self._leaving) >= _MAX_GROUPS or self._leaving[0].arrived.query()):
            compute.wait_event(self._leaving.popleft().arrived)
        blocks = send([block for block, _ in pairs], torch.int64, self._pools[0].device)
        gathered = tuple(pool.index_select(1, blocks).transpose(0, 1).contiguous() for pool in self._pools)
        ready, arrived = torch.cuda.Event(), torch.cuda.Event()
        ready.record(compute)
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            for host, rows in zip(self._host, gathered, strict=True):
                for row, (_, host_block) in enumerate(pairs):
                    host[host_block].copy_(rows[row], non_blocking=True)
            arrived.record(self._stream)
        self._leaving.append(_Group(arrived, gathered))

    def _copy_back(self, pairs: tuple[tuple[int, int], ...]) -> None:
        for pool, host in zip(self._pools, self._host, strict=True):
            for host_block, block in pairs:
                pool[:, block].copy_(host[host_block], non_blocking=True)
