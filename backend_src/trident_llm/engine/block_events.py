"""BlockEvents: what happened to KV blocks, gathered while a step runs and told between steps. Decides nothing.

An event is about one sequence and all blocks of one change. A sequence is allocated every block it takes hold of, new
or shared, and frees each of them once, so what a sequence holds can be followed from the events alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .sequence import Sequence

logger = logging.getLogger(__name__)

SequenceId = tuple[str, int]
"""Request id and sample index."""


class AllocateReason(StrEnum):
    PROMPT = "prompt"
    """For the tokens a sequence had when it was admitted."""
    GROWTH = "growth"
    """For tokens after those."""
    PREFIX_HIT = "prefix_hit"
    """A block of the prefix cache, shared with whoever else holds it."""
    FORK = "fork"
    """Shared with the sample whose prompt was computed."""
    COPY_ON_WRITE = "copy_on_write"
    """The sequence's own copy of a shared block that it writes to."""


class FreeReason(StrEnum):
    FINISHED = "finished"
    ABORTED = "aborted"
    PREEMPTED = "preempted"
    SLIDING_WINDOW = "sliding_window"
    COPY_ON_WRITE = "copy_on_write"
    """The shared block, once copied."""


class EvictReason(StrEnum):
    REUSED = "reused"
    """The sequence needed a free block, and the cached content of this one was the oldest."""
    FLUSHED = "flushed"
    """The weights have changed; no sequence is the cause (its request id is empty)."""


AllocateCallback = Callable[[tuple[int, ...], SequenceId, AllocateReason], None]
FreeCallback = Callable[[tuple[int, ...], SequenceId, FreeReason], None]
EvictCallback = Callable[[tuple[int, ...], SequenceId, EvictReason], None]


@dataclass(slots=True)
class _Event:
    callbacks: list[Callable[..., None]]
    block_ids: tuple[int, ...]
    sequence_id: SequenceId
    reason: StrEnum


class BlockEvents:
    """Callbacks and the events they have not been told yet. What nobody has subscribed to is not gathered."""

    def __init__(self) -> None:
        self._on_allocate: list[Callable[..., None]] = []
        self._on_free: list[Callable[..., None]] = []
        self._on_evict: list[Callable[..., None]] = []
        self._gathered: list[_Event] = []
        self._failed: list[Callable[..., None]] = []

    def subscribe(
        self,
        *,
        on_allocate: AllocateCallback | None = None,
        on_free: FreeCallback | None = None,
        on_evict: EvictCallback | None = None,
    ) -> None:
        """Have callbacks called with block ids, sequence and reason, by ``deliver`` and in the order of the events."""
        if on_allocate is not None:
            self._on_allocate.append(on_allocate)
        if on_free is not None:
            self._on_free.append(on_free)
        if on_evict is not None:
            self._on_evict.append(on_evict)

    def allocated(self, seq: Sequence, block_ids: list[int], reason: AllocateReason) -> None:
        if self._on_allocate and block_ids:
            self._gathered.append(_Event(self._on_allocate, tuple(block_ids), seq.key, reason))

    def freed(self, seq: Sequence, block_ids: list[int], reason: FreeReason) -> None:
        if self._on_free and block_ids:
            self._gathered.append(_Event(self._on_free, tuple(block_ids), seq.key, reason))

    def evicted(self, seq: Sequence | None, block_ids: list[int], reason: EvictReason) -> None:
        """What these blocks held can no longer be shared. ``seq`` took them; None: nobody."""
        if self._on_evict and block_ids:
            key = ("", 0) if seq is None else seq.key
            self._gathered.append(_Event(self._on_evict, tuple(block_ids), key, reason))

    def deliver(self) -> None:
        """Call the callbacks. One that raises is logged the first time, and harms nobody else."""
        if not self._gathered:
            return
        gathered, self._gathered = self._gathered, []
        for event in gathered:
            for callback in event.callbacks:
                try:
                    callback(event.block_ids, event.sequence_id, event.reason)
                except Exception:
                    self._log_failure(callback)

    def _log_failure(self, callback: Callable[..., None]) -> None:
        if not any(failed is callback for failed in self._failed):
            self._failed.append(callback)
            logger.exception("the block callback %r failed; it is called on, and not logged again", callback)


class BlockTotals:
    """How many blocks sequences took and gave back, and how many lost what was cached in them: the engine's own
    subscriber, for its statistics."""

    def __init__(self, events: BlockEvents) -> None:
        self.allocated = self.freed = self.evicted = 0
        events.subscribe(on_allocate=self._allocated, on_free=self._freed, on_evict=self._evicted)

    def _allocated(self, block_ids: tuple[int, ...], sequence_id: SequenceId, reason: AllocateReason) -> None:
        self.allocated += len(block_ids)

    def _freed(self, block_ids: tuple[int, ...], sequence_id: SequenceId, reason: FreeReason) -> None:
        self.freed += len(block_ids)

    def _evicted(self, block_ids: tuple[int, ...], sequence_id: SequenceId, reason: EvictReason) -> None:
        self.evicted += len(block_ids)
