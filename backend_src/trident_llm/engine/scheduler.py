"""Scheduler: which sequences get how many tokens in the next step. Knows no tensors and no clients.

Running sequences that need one token come first, then those whose prompt is still being computed, then new ones, all
within ``max_num_batched_tokens``. A new one whose beginning another is just computing waits to share it, and one whose
adapters find no slot is passed over. When blocks run out, the least urgent and newest running sequence gives its blocks
back and is computed again later. So that urgent ones cannot hold others off for ever, the oldest sequence goes before
all once it is ``PATIENCE`` steps old.
"""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass

from ..adapters.slots import AdapterSlots, SlotLoad
from .block_events import FreeReason
from .block_manager import BlockCopy, BlockManager, PrefixMatch
from .fair_order import in_turn
from .hold import Hold
from .host_tier import HostCopies
from .sequence import Sequence, Status

PATIENCE = 1000
"""Steps after which a sequence that is the oldest becomes overdue."""
SLOT_PATIENCE = 100
"""Steps for which sequences whose adapters lie on the device may go before one whose adapters have no slot."""


@dataclass(frozen=True)
class ScheduledSequence:
    """``num_tokens`` tokens from position ``start`` on. ``sampled`` are the sequences that get a token from the last
    one's logits: none while known tokens remain, this one, and samples that fork off here."""

    seq: Sequence
    start: int
    num_tokens: int
    sampled: tuple[Sequence, ...]
    num_stored: int = 0
    """Leading tokens whose K and V the blocks of ``seq.companion`` held before the step."""


@dataclass(frozen=True)
class SchedulerOutput:
    """One step. Sequences with a single token come first."""

    scheduled: tuple[ScheduledSequence, ...]
    block_copies: tuple[BlockCopy, ...]
    host_copies: HostCopies
    """To be launched even when no sequence is scheduled."""
    num_tokens: int
    slot_loads: tuple[SlotLoad, ...] = ()
    """Likewise."""


class Scheduler:
    """Holds the waiting and running sequences; every method is called between steps, from one thread.

    Nothing starves. An overdue sequence is never preempted, is admitted at the next step whoever must give way, and
    computes at least one token in every step from then on, because ``max_num_batched_tokens >= max_num_seqs`` leaves
    one over after the decodes; so it ends within as many steps as it has tokens in the end. The next oldest follows.
    A sequence therefore ends at most ``patience`` steps, and the final tokens of itself and of all older unfinished
    ones, after it was added; with lookahead one step more for each of those, because a token in flight is waited for,
    and with a host tier another, because blocks that come back are waited for.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        sliding_window: int | None = None,
        patience: int = PATIENCE,
        slots: AdapterSlots | None = None,
    ) -> None:
        """``sliding_window``: tokens a position attends to, itself included; None for all. ``slots``: of adapters;
        None where no sequence has any."""
        self.blocks = blocks
        self.hold = Hold()
        self.slots = slots or AdapterSlots(0, lambda adapters: None)
        self.patience = patience
        self.sliding_window = sliding_window
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_finished = 0
        """Running sequences that have ended, whatever the reason."""
        self.peak_running = 0
        self._added_at: dict[Sequence, int] = {}
        """Step at which each unfinished sequence was added, the oldest first."""

    @property
    def num_unstarted(self) -> int:
        """Sequences that wait for their first step, forks of those included."""
        return sum(1 + len(seq.forks) for seq in self.waiting if not seq.started)

    def add(self, seq: Sequence) -> None:
        for added in (seq, *seq.forks):
            self._added_at.setdefault(added, self.num_steps)
            self.hold.added(added)
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def start_hold(self) -> None:
        """Let what has begun finish, and nothing else begin, until ``hold.end``."""
        self.hold.begin((*self.running, *self.waiting))

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left that may run."""
        return not self.running and all(map(self.hold.keeps_waiting, self.waiting))

    def finish(self, seq: Sequence, reason: FreeReason = FreeReason.FINISHED) -> None:
        """Take a sequence out, whatever its state, and give its blocks back. Its forks start on their own."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self._stop_running(seq, reason)
            self.num_finished += 1
        elif seq in self.waiting:
            self.waiting.remove(seq)
        else:
            for parent in (*self.waiting, *self.running):
                parent.forks = [fork for fork in parent.forks if fork is not seq]
        seq.status = Status.FINISHED
        self._added_at.pop(seq, None)
        self._release_forks(seq)

    def expire(self, queue_timeout: float) -> list[Sequence]:
        """Take out and return the sequences that have waited longer than this for their first step, in seconds."""
        limit = time.monotonic() - queue_timeout
        late = [seq for seq in self.waiting if not seq.started and seq.arrival_time < limit]
        late += [fork for seq in late for fork in seq.forks]
        self.waiting = [seq for seq in self.waiting if seq not in late]
        for seq in late:
            seq.status, seq.forks = Status.FINISHED, []
            del self._added_at[seq]
        return late

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and account for it: ``num_computed`` and ``num_pending`` are those after the step."""
        self.num_steps += 1
        self._serve_overdue()
        budget = self.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        copies: list[BlockCopy] = []
        # Decodes before prompts, and each in order of service: a preemption then hits one not yet scheduled.
        for seq in sorted(self.running, key=lambda s: (s.num_tokens - s.num_computed > 1, s.order)):
            num_tokens = min(seq.num_remaining, budget)
            if num_tokens <= 0 or seq.status is not Status.RUNNING or seq.fetched_at == self.num_steps:
                continue
            if self.sliding_window is not None:
                self.blocks.release_before(seq, seq.num_computed + 1 - self.sliding_window)
            if not self._make_room(seq, num_tokens, scheduled):
                continue
            copies += self.blocks.grow(seq, num_tokens)
            scheduled.append(self._advance(seq, num_tokens))
            budget -= num_tokens
        slots_awaited = False
        for seq in in_turn(self.waiting, self.running):
            if budget == 0 or len(self.running) >= self.max_num_seqs or seq.num_pending:
                break
            if self.hold.keeps_waiting(seq):
                continue
            if seq.waits_for is not None and self.blocks.still_waits(seq):
                continue
            if seq.adapters and (slots_awaited or not self._has_slots(seq)):
                slots_awaited = slots_awaited or self._waits_too_long_for_slots(seq)
                continue
            matched = self.blocks.match_prefix(seq)
            if self.blocks.must_wait(seq, matched):
                continue
            if not self._admit(seq, matched):
                break
            if seq.fetched_at == self.num_steps:
                continue
            num_tokens = min(seq.num_tokens - seq.num_computed, budget)
            scheduled.append(self._advance(seq, num_tokens))
            budget -= num_tokens
        self.peak_running = max(self.peak_running, len(self.running))
        # Rows with the same adapters lie side by side: fewer programs read each of them.
        scheduled.sort(key=lambda item: (item.num_tokens > 1, [adapter.slot for adapter in item.seq.adapters]))
        host_copies = self.blocks.host_tier.take_copies() if self.blocks.host_tier else HostCopies((), ())
        return SchedulerOutput(
            scheduled=tuple(scheduled),
            block_copies=tuple(copies),
            host_copies=host_copies,
            num_tokens=self.max_num_batched_tokens - budget,
            slot_loads=self.slots.take_loads(),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless lists, states and blocks agree."""
        assert all(seq.status is Status.RUNNING for seq in self.running)
        assert all(seq.status is Status.WAITING and not seq.block_table for seq in self.waiting)
        assert self.waiting == sorted(self.waiting, key=lambda s: s.order)
        assert len(self.running) <= self.max_num_seqs
        assert self._added_at.keys() >= {*self.waiting, *self.running}
        assert sum(seq.overdue for seq in (*self.waiting, *self.running)) <= 1
        companions = [seq.companion for seq in self.running if seq.companion is not None]
        self.blocks.check_integrity([*self.running, *companions])
        self.slots.check_integrity([seq.adapters for seq in self.running])

    def _advance(self, seq: Sequence, num_tokens: int) -> ScheduledSequence:
        start, stored = seq.num_computed, 0
        seq.num_computed += num_tokens
        if seq.companion is not None:
            stored = seq.companion.num_computed
            seq.companion.num_computed = max(stored, min(seq.num_computed, seq.freeze_at or seq.num_computed))
        if seq.num_computed < seq.num_tokens:
            return ScheduledSequence(seq, start, num_tokens, (), stored)
        sampled = (seq, *self._start_forks(seq))
        for sample in sampled:
            sample.num_pending += 1
        return ScheduledSequence(seq, start, num_tokens, sampled, stored)

    def _start_forks(self, parent: Sequence) -> list[Sequence]:
        """Samples that share the prompt just computed; those beyond max_num_seqs wait and start on their own."""
        room = self.max_num_seqs - len(self.running)
        forks, parent.forks = parent.forks[:room], parent.forks[room:]
        for seq in forks:
            self.blocks.fork(parent, seq)
            self.slots.acquire(seq.adapters)
            seq.status, seq.started = Status.RUNNING, True
            seq.num_cached_tokens, seq.started_at = parent.num_cached_tokens, parent.started_at
            self.running.append(seq)
        self._release_forks(parent)
        return forks

    def _release_forks(self, parent: Sequence) -> None:
        """Let the remaining forks wait for themselves: one for its own turn, the others for that one's prompt."""
        if parent.forks:
            first, *rest = parent.forks
            parent.forks, first.forks = [], rest
            self.add(first)

    def _make_room(self, seq: Sequence, num_tokens: int, scheduled: list[ScheduledSequence]) -> bool:
        """Preempt others, least urgent and newest first, until ``seq`` can grow; False if it had to go itself."""
        while self.blocks.blocks_to_grow(seq, num_tokens) > self.blocks.num_free:
            chosen = {item.seq for item in scheduled} | {s for item in scheduled for s in item.sampled}
            victim = max((s for s in self.running if s not in chosen), key=lambda s: s.order)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _serve_overdue(self) -> None:
        """Put the oldest sequence before all others when it is overdue, and admit it, whatever must be preempted."""
        oldest = next(iter(self._added_at), None)
        if oldest is None or self.num_steps - self._added_at[oldest] <= self.patience:
            return
        if self.hold.keeps_waiting(oldest):
            return
        if oldest.status is Status.RUNNING:
            oldest.overdue = True
            return
        if not oldest.overdue:
            self.waiting.remove(oldest)
            oldest.overdue = True
            self.add(oldest)
        if oldest.num_pending or not self.slots.ready(oldest.adapters):
            return
        matched = self.blocks.match_prefix(oldest)
        while len(self.running) >= self.max_num_seqs or not self._admit(oldest, matched):
            self._preempt(max(self.running, key=lambda s: s.order))

    def _preempt(self, seq: Sequence) -> None:
        self._stop_running(seq, FreeReason.PREEMPTED)
        seq.status = Status.WAITING
        self.add(seq)
        self.num_preemptions += 1

    def _stop_running(self, seq: Sequence, reason: FreeReason) -> None:
        self.running.remove(seq)
        self.slots.release(seq.adapters)
        self.blocks.free(seq, reason)

    def _has_slots(self, seq: Sequence) -> bool:
        """Whether its adapters could be on the device in the next step."""
        return self.slots.ready(seq.adapters) and self.slots.fits(seq.adapters)

    def _waits_too_long_for_slots(self, seq: Sequence) -> bool:
        """Whether sequences after it that take adapters must wait too, so that slots become free."""
        if seq.passed_over_since is None:
            seq.passed_over_since = self.num_steps
        return self.num_steps - seq.passed_over_since >= SLOT_PATIENCE

    def _admit(self, seq: Sequence, matched: PrefixMatch) -> bool:
        """Reserve the whole sequence's blocks, so that computing its prompt preempts nobody."""
        # Running sequences grow: a small reserve keeps an admission from being preempted right away.
        reserve = len(self.running) // 8 if self.running else 0
        if self.blocks.blocks_missing(matched, seq.num_tokens) + reserve > self.blocks.num_free:
            return False
        if not self._has_slots(seq):
            return False
        self.slots.acquire(seq.adapters)
        seq.passed_over_since = None
        self.blocks.admit(seq, matched, seq.num_tokens)
        if matched.num_host:
            # Its blocks are copied while this step runs without it.
            seq.fetched_at = self.num_steps
        if not seq.started:
            self.blocks.count_query(seq, matched)
            seq.started, seq.num_cached_tokens, seq.started_at = True, seq.num_computed, time.monotonic()
        self.waiting.remove(seq)
        seq.status = Status.RUNNING
        self.running.append(seq)
        return True
