"""Builders for engine tests: sequences and a scheduler over a few blocks, and a step that needs no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from trident_llm.engine.block_manager import BlockManager
from trident_llm.engine.host_tier import HostTier, TransferCosts
from trident_llm.engine.scheduler import PATIENCE, Scheduler, SchedulerOutput
from trident_llm.engine.sequence import Sequence
from trident_llm.protocol import SamplingParams

_arrivals = itertools.count()
FREE_TRANSFERS = TransferCosts(block_seconds=0.0, token_seconds=1.0)
"""Copying back always pays."""


def make_sequence(prompt: list[int], *, name: str = "r", priority: int = 0, salt: bytes = b"", max_tokens: int = 8):
    arrival = next(_arrivals)
    return Sequence(
        request_id=f"{name}{arrival}",
        sample_index=0,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        max_total_tokens=len(prompt) + max_tokens,
        params=SamplingParams(seed=0, max_tokens=max_tokens),
        stop_ids=frozenset(),
        priority=priority,
        arrival=arrival,
        salt=salt,
    )


def make_scheduler(
    num_blocks: int = 8,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    caching: bool = True,
    window: int | None = None,
    patience: int = PATIENCE,
    host_blocks: int = 0,
) -> Scheduler:
    tier = HostTier(host_blocks, block_size, FREE_TRANSFERS) if host_blocks else None
    blocks = BlockManager(num_blocks, block_size, prefix_caching=caching, host_tier=tier)
    return Scheduler(
        blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        sliding_window=window,
        patience=patience,
    )


def finish_step(
    scheduler: Scheduler, output: SchedulerOutput, token: Callable[[Sequence], int] = lambda seq: len(seq.token_ids)
) -> list[Sequence]:
    """Pretend the model ran: every sampled sequence gets a token; returns those that reached max_tokens."""
    finished = []
    for item in output.scheduled:
        for seq in item.sampled:
            seq.num_pending -= 1
            seq.token_ids.append(token(seq))
            if seq.num_output_tokens >= seq.params.max_tokens:
                finished.append(seq)
        scheduler.blocks.register(item.seq)
    for seq in finished:
        scheduler.finish(seq)
    scheduler.check_integrity()
    return finished
