"""Sequence: one sample of one request as the engine sees it: tokens, progress and the blocks it holds."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..protocol import SamplingParams

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter, Blend
    from ..adapters.mix import MixUse
    from .adapter_usage import AdapterUsage


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """There is no prefill or decode phase: every step gives a sequence some tokens, so that ``num_computed``
    catches up with ``num_tokens``. When it does, the model's output is one more token.

    Invariants: ``num_computed <= num_tokens``; ``block_table`` covers at least ``num_computed`` tokens while running.
    """

    request_id: str
    sample_index: int
    token_ids: list[int]
    """Prompt and output tokens that the host knows."""
    num_prompt_tokens: int
    params: SamplingParams
    max_total_tokens: int
    """Prompt and output together end here."""
    stop_ids: frozenset[int]
    """Tokens that end the sequence: the model's own unless ignore_eos, and stop_token_ids."""
    priority: int = 0
    arrival: int = 0
    """Order of arrival; unique in an engine."""
    user: str = ""
    """Whose it is: users share the engine when there is not room for all."""
    salt: bytes = b""
    """Enters every block hash: blocks are shared between equal salts only."""
    blend: Blend | MixUse | None = None
    """What it takes of which adapters."""
    usages: tuple[AdapterUsage, ...] = ()
    """Where its tokens are counted by adapter."""
    companion: Sequence | None = None
    """With a mix: the same tokens as the pass sees them that yields the classifier's input. It owns the blocks of that
    pass and is never scheduled; ``num_computed`` counts what its blocks hold, at least as much as this one's."""
    cache_limit: int | None = None
    """Blocks that reach beyond so many tokens are not shared: what they hold depends on more than their tokens."""
    wants_scalings: bool = False
    """Whether the scalings of its tokens' adapters go with them, averaged over all modules."""
    wants_layer_scalings: bool = False
    """Whether they go with them layer by layer."""
    calibration: bool = False
    """Whether its tokens may be kept and calibrated on."""
    arrival_time: float = field(default_factory=time.monotonic)
    requested_at: float = 0.0
    """When its request reached a door; as all times on the monotonic clock."""
    started_at: float = 0.0
    """When its first step was scheduled."""
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    """Of those computed here; 0 before the first."""
    status: Status = Status.WAITING
    started: bool = False
    overdue: bool = False
    """The oldest of all, and too old: nothing goes before it any more."""
    num_computed: int = 0
    """Tokens whose K and V are in the cache, the step in flight included."""
    num_pending: int = 0
    """Tokens sampled by the step in flight: part of the sequence, but not yet known to the host."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Hash chain of the full blocks, as far as it has been computed."""
    num_registered: int = 0
    """Leading blocks of ``block_table`` that the prefix cache knows."""
    num_released: int = 0
    """Leading blocks of ``block_table`` that a sliding window has passed and that were given back."""
    num_announced: int = 0
    """Blocks before this index will be registered by this sequence, those from ``num_registered`` on later."""
    fetched_at: int = 0
    """The last step before which blocks of it were copied back from the host tier."""
    passed_over_since: int | None = None
    """The step at which others first went before it, because there was no slot for its adapters."""
    waits_for: bytes | None = None
    """Hash of the next block of its prefix, which another sequence is computing."""
    forks: list[Sequence] = field(default_factory=list)
    """Samples of the same request that start when this one's prompt is computed."""

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.sample_index

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return () if self.blend is None else self.blend.adapters

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_cacheable(self) -> int:
        """Leading tokens whose full blocks may be shared."""
        known = len(self.token_ids)
        return known if self.cache_limit is None else min(known, self.cache_limit)

    @property
    def freeze_at(self) -> int | None:
        """The first token that takes the scalings of the one before it; None: every token has its own."""
        if self.companion is None or self.blend is None or not self.blend.freeze_after:
            return None
        return self.num_prompt_tokens + self.blend.freeze_after

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens that can be computed now: none when all that is left is to learn what was sampled."""
        return 0 if self.num_tokens >= self.max_total_tokens else self.num_tokens - self.num_computed

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort key of service: overdue, then urgent, then first come. The largest is preempted first."""
        return not self.overdue, self.priority, self.arrival
