"""Events about KV blocks: what they say, when they come, and that nothing depends on whoever listens."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter

import pytest

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.block_events import BlockEvents, FreeReason
from trident_llm.engine.block_manager import BlockManager, PrefixMatch
from trident_llm.engine.engine import EngineCore
from trident_llm.protocol import SampleStart, SamplingParams, Submit

from .helpers import finish_step, make_scheduler, make_sequence

_names = itertools.count()


class Recorder:
    """Keeps what it is told, and follows from it alone who holds which block."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[int, ...], str]] = []
        self.held: Counter[tuple[tuple[str, int], int]] = Counter()
        self.num_evicted = 0

    def on_allocate(self, block_ids, sequence_id, reason):
        self.told.append(("allocate", block_ids, str(reason)))
        self.held.update((sequence_id, block) for block in block_ids)
        assert all(self.held[sequence_id, block] == 1 for block in block_ids), "allocated twice"

    def on_free(self, block_ids, sequence_id, reason):
        self.told.append(("free", block_ids, str(reason)))
        for block in block_ids:
            assert self.held.pop((sequence_id, block)) == 1, "freed what was not held"

    def on_evict(self, block_ids, sequence_id, reason):
        self.told.append(("evict", block_ids, str(reason)))
        self.num_evicted += len(block_ids)

    @property
    def callbacks(self):
        return {"on_allocate": self.on_allocate, "on_free": self.on_free, "on_evict": self.on_evict}

    def take(self):
        told, self.told = self.told, []
        return told

    @property
    def reasons(self):
        return {(kind, reason) for kind, _, reason in self.told}


def recorded_scheduler(**options):
    scheduler, recorder = make_scheduler(**options), Recorder()
    scheduler.blocks.events.subscribe(**recorder.callbacks)
    return scheduler, recorder


def step(scheduler):
    finish_step(scheduler, scheduler.schedule())
    scheduler.blocks.events.deliver()


def test_prompt_growth_hit_and_end_of_a_sequence():
    scheduler, recorder = recorded_scheduler(num_blocks=3)
    scheduler.add(make_sequence([1] * 7, max_tokens=4))
    step(scheduler)
    assert recorder.take() == [("allocate", (0, 1), "prompt")]
    step(scheduler)
    assert recorder.take() == []
    step(scheduler)
    step(scheduler)
    assert recorder.take() == [("allocate", (2,), "growth"), ("free", (0, 1, 2), "finished")]
    scheduler.add(make_sequence([1] * 5, max_tokens=1))
    step(scheduler)
    assert recorder.take() == [
        ("allocate", (0,), "prefix_hit"), ("allocate", (2,), "prompt"), ("free", (0, 2), "finished"),
    ]  # fmt: skip


def test_cached_content_that_is_overwritten_is_evicted_by_who_takes_the_block():
    scheduler, recorder = recorded_scheduler(num_blocks=2)
    scheduler.add(make_sequence([1] * 4, max_tokens=1))
    step(scheduler)
    recorder.take()
    scheduler.add(make_sequence([2] * 7, max_tokens=1))
    step(scheduler)
    assert recorder.take() == [
        ("evict", (0,), "reused"), ("allocate", (1, 0), "prompt"), ("free", (1, 0), "finished"),
    ]  # fmt: skip
    assert scheduler.blocks.num_cached == 1


def test_a_fork_that_writes_gets_a_copy_and_frees_the_original():
    scheduler, recorder = recorded_scheduler()
    parent = make_sequence([1] * 6)
    parent.forks = [make_sequence([1] * 6)]
    scheduler.add(parent)
    step(scheduler)
    assert recorder.take() == [("allocate", (0, 1), "prompt"), ("allocate", (0, 1), "fork")]
    step(scheduler)
    assert recorder.take() == [("allocate", (2,), "copy_on_write"), ("free", (1,), "copy_on_write")]
    assert set(recorder.held) == {(seq.key, block) for seq in scheduler.running for block in seq.block_table}


def test_a_sliding_window_and_an_abort_say_so():
    scheduler, recorder = recorded_scheduler(window=4)
    seq = make_sequence([1] * 8)
    scheduler.add(seq)
    step(scheduler)
    recorder.take()
    step(scheduler)
    assert recorder.take() == [("free", (0,), "sliding_window"), ("allocate", (2,), "growth")]
    scheduler.finish(seq, FreeReason.ABORTED)
    scheduler.blocks.events.deliver()
    assert recorder.take() == [("free", (1, 2), "aborted")]


def test_events_wait_for_the_end_of_the_step():
    scheduler, recorder = recorded_scheduler()
    scheduler.add(make_sequence([1] * 4))
    output = scheduler.schedule()
    assert recorder.told == []
    finish_step(scheduler, output)
    scheduler.blocks.events.deliver()
    assert recorder.told


def test_nothing_is_gathered_for_nobody():
    events = BlockEvents()
    told = []
    events.subscribe(on_free=lambda *event: told.append(event))
    manager = BlockManager(4, 4, prefix_caching=True, events=events)
    seq = make_sequence([1] * 9)
    manager.admit(seq, PrefixMatch([]), 9)
    assert events._gathered == []
    manager.free(seq)
    events.deliver()
    assert told == [((0, 1, 2), seq.key, "finished")]


def test_a_callback_that_raises_is_logged_once_and_disturbs_nobody(caplog):
    events, told = BlockEvents(), []

    def broken(block_ids, sequence_id, reason):
        raise RuntimeError("out of order")

    events.subscribe(on_allocate=broken)
    events.subscribe(on_allocate=lambda block_ids, sequence_id, reason: told.append(block_ids))
    manager = BlockManager(4, 4, prefix_caching=True, events=events)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            seq = make_sequence([1] * 3)
            manager.admit(seq, PrefixMatch([]), 3)
            events.deliver()
            manager.free(seq)
    assert told == [(0,), (0,)]
    assert [record.message.split(" failed")[0] for record in caplog.records] == [f"the block callback {broken!r}"]
    assert "out of order" in caplog.text


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def submit(prompt, samples=1, max_tokens=12):
    return Submit(
        request_id=f"r{next(_names)}",
        prompt_ids=list(prompt),
        params=SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True),
        samples=[SampleStart(index=i) for i in range(samples)],
    )


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_engine_tells_after_each_step_what_its_sequences_hold(model_folder, lookahead):
    rng, recorder = random.Random(0), Recorder()
    config = EngineConfig(
        model=str(model_folder), dtype="fp32", device="cpu", num_threads=1, max_num_blocks=12, block_size=8,
        max_num_seqs=6, max_num_batched_tokens=16, sliding_window=24,
    )  # fmt: skip
    core = EngineCore(config, lookahead=lookahead, **recorder.callbacks)
    requests = [submit([rng.choice([7, 8])] * rng.randint(1, 40), samples=rng.randint(1, 3)) for _ in range(30)]
    for request in requests:
        core.add(request)
    for number in range(1000):
        if not core.has_work():
            break
        core.step()
        if number == 3:
            core.abort(core.scheduler.running[0].request_id)
        running = core.scheduler.running
        expected = {(seq.key, block) for seq in running for block in seq.block_table[seq.num_released :]}
        assert set(recorder.held) == expected
    assert not core.has_work() and not recorder.held
    kinds = {"finished", "aborted", "preempted", "sliding_window", "copy_on_write"}
    assert recorder.reasons == {
        *(("free", reason) for reason in kinds), ("evict", "reused"),
        *(("allocate", reason) for reason in ("prompt", "growth", "prefix_hit", "fork", "copy_on_write")),
    }  # fmt: skip
    stats = core.stats()
    allocated = sum(len(blocks) for kind, blocks, _ in recorder.told if kind == "allocate")
    assert stats["kv_blocks_allocated_total"] == stats["kv_blocks_freed_total"] == allocated
    assert stats["kv_blocks_evicted_total"] == recorder.num_evicted > 0


def test_the_engine_goes_on_when_a_callback_breaks(model_folder, caplog):
    def broken(*event):
        raise RuntimeError("out of order")

    config = EngineConfig(model=str(model_folder), dtype="fp32", device="cpu", num_threads=1, max_num_blocks=12)
    core = EngineCore(config, on_allocate=broken, on_free=broken, on_evict=broken)
    core.add(submit([5, 6, 7], max_tokens=40))
    num_tokens = 0
    while core.has_work():
        num_tokens += sum(len(delta.token_ids) for delta in core.step())
    assert num_tokens == 40
    assert len(caplog.records) == 1
    core.check_integrity()
