"""Sequences with companions in a scheduler over few blocks: both passes are accounted for, whatever happens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.helpers import finish_step, make_sequence
from trident_llm.engine.paired_blocks import PairedBlocks
from trident_llm.engine.scheduler import Scheduler
from trident_llm.engine.sequence import Sequence

SIZE = 4


@dataclass(frozen=True)
class FakeUse:
    """What a scheduler needs of a mix: no adapters, so no slots."""

    freeze_after: int = 0
    adapters: tuple[Any, ...] = ()


def make_scheduler(num_blocks: int, **settings: Any) -> Scheduler:
    blocks = PairedBlocks(num_blocks, SIZE, prefix_caching=True)
    return Scheduler(blocks, **{"max_num_seqs": 4, "max_num_batched_tokens": 16, **settings})


def paired(prompt: list[int], *, freeze_after: int = 0, **options: Any) -> Sequence:
    """As the engine makes them."""
    seq = make_sequence(prompt, salt=b"mix", **options)
    seq.blend = FakeUse(freeze_after)  # type: ignore[assignment]
    seq.companion = make_sequence(prompt)
    seq.companion.token_ids = seq.token_ids
    if seq.freeze_at is not None:
        seq.cache_limit = seq.companion.cache_limit = seq.freeze_at - 1
    return seq


def finish(scheduler: Scheduler) -> None:
    for _ in range(200):
        if not scheduler.waiting and not scheduler.running:
            return
        finish_step(scheduler, scheduler.schedule(), token=lambda seq: 7)
    pytest.fail("sequences do not end")


def test_what_the_first_pass_has_is_kept_and_not_written_again() -> None:
    scheduler = make_scheduler(20)
    prompt = list(range(10, 22))
    scheduler.add(make_sequence(prompt, max_tokens=1))
    finish(scheduler)
    seq = paired(prompt, max_tokens=2)
    scheduler.add(seq)
    (item,) = scheduler.schedule().scheduled
    assert (item.start, item.num_tokens, item.num_stored) == (0, 12, 8), "all but the last block come from the cache"
    assert scheduler.blocks.num_used == 2 * 3
    assert seq.companion is not None and seq.companion.num_computed == 12
    scheduler.check_integrity()


def test_a_later_sequence_uses_what_both_passes_have() -> None:
    scheduler = make_scheduler(20)
    prompt = list(range(10, 23))
    for _ in range(2):
        scheduler.add(paired(prompt, max_tokens=1))
        output = scheduler.schedule()
        finish_step(scheduler, output)
    (item,) = output.scheduled
    assert (item.start, item.num_stored) == (12, 12)


def test_frozen_tokens_need_no_first_pass() -> None:
    scheduler = make_scheduler(20)
    seq = paired([1, 2, 3, 4, 5], freeze_after=2, max_tokens=12)
    scheduler.add(seq)
    while scheduler.running or scheduler.waiting:
        finish_step(scheduler, scheduler.schedule(), token=lambda seq: 7)
        assert seq.companion is not None
        assert seq.companion.num_computed == min(seq.num_computed, 7)
        assert len(seq.companion.block_table) <= 2
    assert all(block_hash is not None for block_hash in seq.block_hashes[:1]) and len(seq.block_hashes) == 1


@pytest.mark.parametrize("seed", range(25))
def test_any_mix_of_requests_ends_and_loses_no_block(seed: int) -> None:
    choose = random.Random(seed)
    scheduler = make_scheduler(choose.randint(14, 24), patience=choose.choice((3, 1000)))
    alive: list[Sequence] = []
    for step in range(120):
        if step < 60 and choose.random() < 0.5:
            prompt = [5] * choose.choice((0, 4, 8)) + choose.choices(range(3), k=choose.randint(1, 7))
            seq = _random_sequence(choose, prompt)
            scheduler.add(seq)
            alive.append(seq)
        if alive and choose.random() < 0.05:
            scheduler.finish(alive.pop(choose.randrange(len(alive))))
        finish_step(scheduler, scheduler.schedule(), token=lambda seq: choose.randrange(3))
    finish(scheduler)
    assert scheduler.blocks.num_used == 0


def _random_sequence(choose: random.Random, prompt: list[int]) -> Sequence:
    priority, max_tokens = choose.randint(0, 2), choose.randint(1, 9)
    if choose.random() < 0.4:
        return make_sequence(prompt, priority=priority, max_tokens=max_tokens)
    freeze_after = choose.choice((0, 0, 2))
    seq = paired(prompt, priority=priority, max_tokens=max_tokens, freeze_after=freeze_after)
    if choose.random() < 0.3:
        seq.forks = [paired(prompt, priority=priority, max_tokens=max_tokens, freeze_after=freeze_after)]
    return seq
