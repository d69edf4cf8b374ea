"""Any order of add, step, cancel and fork keeps scheduler and blocks consistent, every request finishes, and each step
finds in the pool what its sequences have computed, whatever was shared, copied, evicted and fetched from the host."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from trident_llm.engine.sequence import Status

from .helpers import finish_step, make_scheduler, make_sequence


class SchedulerMachine(RuleBasedStateMachine):
    """Tokens are a function of position, so equal prompts stay equal and blocks really are shared."""

    requests = Bundle("requests")
    num_preemptions = 0
    num_hit_tokens = 0
    num_swapped = 0

    @initialize(
        num_blocks=st.integers(5, 10),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 20),
        caching=st.booleans(),
        window=st.sampled_from([None, None, 3, 8]),
        patience=st.sampled_from([0, 5, 1000]),
        host_blocks=st.sampled_from([0, 1, 3, 20]),
    )
    def start(self, num_blocks, max_num_seqs, budget, caching, window, patience, host_blocks):
        self.scheduler = make_scheduler(
            num_blocks, 4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, caching=caching, window=window,
            patience=patience, host_blocks=host_blocks if caching else 0,
        )  # fmt: skip
        self.live = []
        self.pool = {}
        """What each slot of the pool holds: the sequence's tokens up to that position, and its salt."""
        self.host = {}

    @rule(
        target=requests,
        length=st.integers(1, 12),
        kind=st.integers(0, 1),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([b"", b"x"]),
        max_tokens=st.integers(1, 8),
        num_forks=st.integers(0, 3),
    )
    def add(self, length, kind, priority, salt, max_tokens, num_forks):
        options = {"priority": priority, "salt": salt, "max_tokens": max_tokens}
        seqs = [make_sequence([kind] * length, **options) for _ in range(1 + num_forks)]
        seqs[0].forks = seqs[1:]
        self.scheduler.add(seqs[0])
        self.live += seqs
        return seqs

    @rule(seqs=consumes(requests), which=st.integers(0, 3))
    def cancel(self, seqs, which):
        self.scheduler.finish(seqs[min(which, len(seqs) - 1)])

    @rule()
    def step(self):
        self._run()

    def _run(self):
        output = self.scheduler.schedule()
        assert output.num_tokens <= self.scheduler.max_num_batched_tokens
        singles = [item.num_tokens == 1 for item in output.scheduled]
        assert singles == sorted(singles, reverse=True)
        written = [slot for item in output.scheduled for slot in self._slots(item)]
        assert len(written) == len(set(written)), "two tokens of one step share a slot"
        self._compute(output)
        finish_step(self.scheduler, output)

    def _compute(self, output):
        """Copies out come before the step, copies back while it runs."""
        size = self.scheduler.blocks.block_size
        for block, host in output.host_copies.out:
            self.host[host] = [self.pool[block, offset] for offset in range(size)]
        for copy in output.block_copies:
            for offset in range(size):
                self.pool[copy.destination, offset] = self.pool.get((copy.source, offset))
        for item in output.scheduled:
            seq, end = item.seq, item.start + item.num_tokens
            slots = [(seq.block_table[p // size], p % size) for p in range(seq.num_released * size, end)]
            tokens = [*seq.token_ids, None][:end]
            content = [(seq.salt, tuple(tokens[: p + 1])) for p in range(seq.num_released * size, end)]
            first_new = item.start - seq.num_released * size
            assert [self.pool[slot] for slot in slots[:first_new]] == content[:first_new]
            self.pool.update(zip(slots[first_new:], content[first_new:], strict=True))
        for host, block in output.host_copies.back:
            self.pool.update({(block, offset): content for offset, content in enumerate(self.host[host])})

    @invariant()
    def consistent(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if all(seq.status is Status.FINISHED for seq in self.live):
                break
            self._run()
        assert all(seq.status is Status.FINISHED for seq in self.live)
        type(self).num_preemptions += self.scheduler.num_preemptions
        type(self).num_hit_tokens += self.scheduler.blocks.num_hit_tokens
        blocks = self.scheduler.blocks
        type(self).num_swapped += blocks.host_tier.num_swapped if blocks.host_tier else 0
        assert blocks.num_free == blocks.num_blocks and blocks.num_used == 0

    def _slots(self, item):
        size = self.scheduler.blocks.block_size
        return [(item.seq.block_table[p // size], p % size) for p in range(item.start, item.start + item.num_tokens)]


class TestSchedulerMachine(SchedulerMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

    @classmethod
    def tearDownClass(cls):
        assert SchedulerMachine.num_preemptions > 0, "no run preempted anything"
        assert SchedulerMachine.num_hit_tokens > 0, "no run hit the prefix cache"
        assert SchedulerMachine.num_swapped > 0, "no run used the host tier"
