"""HostTier: which KV blocks that the pool has lost still have a copy in host memory. Knows hashes and ids, no tensors.

A cached block that is taken for something else is copied out first; when its content is asked for again, it is copied
into a new block, if that beats computing it again. Preempted sequences come back the same way, because their full
blocks are cached like all others. The least recently used copy gives way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HostCopies:
    """Blocks to copy before the next step, all of ``out`` before any of ``back``: pairs of source and destination."""

    out: tuple[tuple[int, int], ...]
    """Pool block to host block. The step may overwrite the pool block."""
    back: tuple[tuple[int, int], ...]
    """Host block to pool block. The step leaves the pool block alone, the one after it reads it."""

    def __bool__(self) -> bool:
        return bool(self.out or self.back)


@dataclass(frozen=True)
class TransferCosts:
    """Measured on this machine when the engine starts."""

    block_seconds: float
    """To copy a block back to the pool."""
    token_seconds: float
    """To compute a prompt's token in a full step."""


class HostTier:
    """Room for ``num_blocks`` copies. Calls between two ``take_copies`` belong to one step."""

    def __init__(self, num_blocks: int, block_size: int, costs: TransferCosts) -> None:
        self.num_blocks = num_blocks
        self._block_size = block_size
        self.set_costs(costs)
        self._free = list(range(num_blocks))
        self._host_of_hash: OrderedDict[bytes, int] = OrderedDict()
        self._pinned: set[bytes] = set()
        """Copies about to be read: this step must not replace them."""
        self._out: list[tuple[int, int]] = []
        self._back: list[tuple[int, int]] = []
        self.step_seconds = 0.0
        """How long steps take at present: what comes back is read one step later."""
        self.num_swapped = 0
        """Blocks copied in either direction since the start."""

    def set_costs(self, costs: TransferCosts) -> None:
        """They have been measured."""
        self._gain = self._block_size * costs.token_seconds - costs.block_seconds
        """Seconds saved by each block that is copied instead of computed."""

    def clear(self) -> None:
        """Forget all copies; between two steps."""
        self._free = list(range(self.num_blocks))
        self._host_of_hash.clear()

    @property
    def num_used(self) -> int:
        return len(self._host_of_hash)

    def count_leading(self, digests: Sequence[bytes]) -> int:
        """How many of the first of these blocks have a copy, or 0 where computing them again is quicker."""
        count = 0
        for digest in digests:
            if digest not in self._host_of_hash:
                break
            count += 1
        return count if count * self._gain > self.step_seconds else 0

    def pin(self, digests: Sequence[bytes]) -> None:
        """Keep these copies through this step's ``store`` calls."""
        self._pinned.update(digests)

    def store(self, digest: bytes, block: int) -> None:
        """Have the pool's ``block``, whose content has this hash, copied out, unless there is a copy or no room."""
        if digest in self._host_of_hash:
            self._host_of_hash.move_to_end(digest)
            return
        host = self._free.pop() if self._free else self._replace_oldest()
        if host is not None:
            self._host_of_hash[digest] = host
            self._out.append((block, host))

    def fetch(self, digest: bytes, block: int) -> None:
        """Have the copy of this hash, which exists, copied to the pool's ``block``."""
        self._host_of_hash.move_to_end(digest)
        self._back.append((self._host_of_hash[digest], block))

    def take_copies(self) -> HostCopies:
        """The copies that this step's calls asked for."""
        copies = HostCopies(tuple(self._out), tuple(self._back))
        self.num_swapped += len(self._out) + len(self._back)
        self._out.clear()
        self._back.clear()
        self._pinned.clear()
        return copies

    def check_integrity(self) -> None:
        """Raise AssertionError unless every host block is free or holds one copy."""
        held = sorted([*self._free, *self._host_of_hash.values()])
        assert held == list(range(self.num_blocks)), "host blocks are lost or held twice"

    def _replace_oldest(self) -> int | None:
        oldest = next((digest for digest in self._host_of_hash if digest not in self._pinned), None)
        return None if oldest is None else self._host_of_hash.pop(oldest)
