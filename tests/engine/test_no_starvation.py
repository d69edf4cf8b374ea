"""Every sequence ends within the bound that Scheduler states, whoever else keeps coming."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trident_llm.engine.sequence import Sequence, Status

from .helpers import finish_step, make_scheduler, make_sequence

BLOCK_SIZE = 4
NUM_STEPS = 120


@dataclass(frozen=True)
class Arrival:
    """Tokens as a share of the pool, so that each fits alone."""

    prompt: float
    output: float
    kind: int
    priority: int
    num_forks: int

    def sequences(self, num_blocks: int) -> list[Sequence]:
        """A sequence that will have 2 tokens to as many as the pool holds, and its forks."""
        total = 2 + round((num_blocks * BLOCK_SIZE - 2) * self.prompt)
        max_tokens = 1 + round((total - 2) * self.output)
        options = {"priority": self.priority, "max_tokens": max_tokens}
        first, *forks = (
            make_sequence([self.kind] * (total - max_tokens), **options) for _ in range(1 + self.num_forks)
        )
        first.forks = forks
        return [first, *forks]


arrivals = st.builds(
    Arrival,
    prompt=st.sampled_from([0.1, 0.3, 0.3, 0.6, 1.0]),
    output=st.floats(0, 1),
    kind=st.integers(0, 2),
    priority=st.integers(-2, 2),
    num_forks=st.sampled_from([0, 0, 0, 1, 3]),
)


def final_tokens(seq: Sequence) -> int:
    return seq.num_prompt_tokens + seq.params.max_tokens


class DelayedRunner:
    """Finishes each step after the next one was scheduled, as the engine does with lookahead; or at once."""

    def __init__(self, scheduler, lookahead: bool) -> None:
        self.scheduler, self.lookahead, self.in_flight = scheduler, lookahead, None

    def step(self) -> None:
        output = self.scheduler.schedule()
        finished, self.in_flight = (self.in_flight, output) if self.lookahead else (output, None)
        if finished is not None:
            self._finish(finished)

    def _finish(self, output) -> None:
        for item in output.scheduled:
            for seq in item.sampled:
                seq.num_pending -= 1
                if seq.status is Status.FINISHED:
                    continue
                seq.token_ids.append(len(seq.token_ids))
                if seq.num_output_tokens >= seq.params.max_tokens:
                    self.scheduler.blocks.register(seq)
                    self.scheduler.finish(seq)
            self.scheduler.blocks.register(item.seq)
        self.scheduler.check_integrity()


@settings(max_examples=150, deadline=None)
@given(
    pattern=st.lists(st.lists(arrivals, max_size=3), min_size=1, max_size=6),
    num_blocks=st.integers(4, 12),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(0, 12),
    patience=st.integers(0, 30),
    caching=st.booleans(),
    window=st.sampled_from([None, None, 6]),
    lookahead=st.booleans(),
)
def test_every_request_ends_within_the_bound(
    pattern, num_blocks, max_num_seqs, extra_budget, patience, caching, window, lookahead
):
    scheduler = make_scheduler(
        num_blocks, BLOCK_SIZE, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra_budget,
        caching=caching, window=window, patience=patience,
    )  # fmt: skip
    runner = DelayedRunner(scheduler, lookahead)
    unfinished: dict[Sequence, int] = {}
    for step in range(NUM_STEPS):
        for arrival in pattern[step % len(pattern)]:
            sequences = arrival.sequences(num_blocks)
            scheduler.add(sequences[0])
            for seq in sequences:
                older = sum(final_tokens(other) + lookahead for other in (*unfinished, seq))
                unfinished[seq] = step + patience + older
        runner.step()
        unfinished = {seq: bound for seq, bound in unfinished.items() if seq.status is not Status.FINISHED}
        late = [seq.key for seq, bound in unfinished.items() if step + 1 > bound]
        assert not late


def steps_until_served(patience: int, *, victim, rival, max_steps: int = 400) -> int:
    """Steps until ``victim()`` ends while each step brings a ``rival()``, which takes the whole pool."""
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_seqs=4, caching=False, patience=patience)
    seq = victim()
    scheduler.add(seq)
    for step in range(max_steps):
        scheduler.add(rival())
        finish_step(scheduler, scheduler.schedule())
        if seq.status is Status.FINISHED:
            return step + 1
    return max_steps


@pytest.mark.parametrize("victim_tokens", [4, 12])
def test_urgent_requests_hold_a_casual_one_off_for_its_patience_only(victim_tokens):
    def run(patience):
        return steps_until_served(
            patience,
            victim=lambda: make_sequence([1] * victim_tokens, priority=1, max_tokens=4),
            rival=lambda: make_sequence([2] * 12, priority=0, max_tokens=4),
        )

    assert run(10_000) == 400, "the rivals alone would never let it through"
    assert run(50) <= 50 + victim_tokens + 4


def test_a_sequence_that_waits_for_a_prefix_is_not_overtaken_for_ever():
    """Each newcomer computes the block that the old one waits for, and its end overwrites it again."""
    scheduler = make_scheduler(num_blocks=3, block_size=4, max_num_seqs=2, max_num_batched_tokens=2, patience=40)
    scheduler.add(make_sequence([1] * 8, priority=-1, max_tokens=1))
    scheduler.schedule()
    waits = make_sequence([1] * 8, max_tokens=3)
    scheduler.add(waits)
    for _ in range(40 + 9 + 11):
        scheduler.add(make_sequence([1] * 8, priority=-1, max_tokens=4))
        finish_step(scheduler, scheduler.schedule())
    assert waits.status is Status.FINISHED


def test_an_overdue_prompt_larger_than_the_step_gets_on_in_every_step_although_urgent_ones_grow():
    scheduler = make_scheduler(num_blocks=10, block_size=4, max_num_batched_tokens=4, caching=False, patience=3)
    long = make_sequence([1] * 30, priority=5, max_tokens=2)
    scheduler.add(long)
    for _ in range(3):
        scheduler.add(make_sequence([2], max_tokens=24))
    progress, num_preemptions = [], 0
    while long.status is not Status.FINISHED:
        before = long.num_computed
        output = scheduler.schedule()
        if long.overdue:
            progress.append(long.num_computed - before)
            num_preemptions = scheduler.num_preemptions
        finish_step(scheduler, output)
    assert min(progress) > 0 and sum(progress) >= 30
    assert num_preemptions > 0


def test_the_overdue_one_is_admitted_at_once_and_the_least_urgent_gives_way():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_batched_tokens=24, caching=False, patience=1)
    casual = make_sequence([1] * 8, priority=3)
    urgent, less_urgent = (make_sequence([2] * 11, priority=priority) for priority in (0, 1))
    for seq in (casual, less_urgent, urgent):
        scheduler.add(seq)
    finish_step(scheduler, scheduler.schedule())
    assert scheduler.running == [urgent, less_urgent]
    finish_step(scheduler, scheduler.schedule())
    assert scheduler.running == [urgent, casual] and less_urgent.status is Status.WAITING
    assert casual.overdue and not urgent.overdue


def test_only_the_oldest_is_overdue_and_the_next_when_it_has_ended():
    scheduler = make_scheduler(num_blocks=32, patience=1)
    first, second = make_sequence([1] * 4, max_tokens=4), make_sequence([2] * 4, max_tokens=6)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(3):
        finish_step(scheduler, scheduler.schedule())
    assert first.overdue and not second.overdue
    finish_step(scheduler, scheduler.schedule())
    finish_step(scheduler, scheduler.schedule())
    assert first.status is Status.FINISHED and second.overdue
