"""Which blocks are copied to host memory and back, and when that is worth it."""

from __future__ import annotations

import pytest

from tests.engine.helpers import FREE_TRANSFERS, finish_step, make_scheduler, make_sequence
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.engine.host_tier import HostCopies, HostTier, TransferCosts
from trident_llm.errors import BadRequest


def run_alone(scheduler, tokens):
    """Run one sequence to its end; returns its cached tokens and the copies of all steps."""
    seq = make_sequence(tokens, max_tokens=1)
    scheduler.add(seq)
    copies = []
    while scheduler.waiting or scheduler.running:
        output = scheduler.schedule()
        copies.append(output.host_copies)
        finish_step(scheduler, output)
    return seq.num_cached_tokens, copies


def test_an_evicted_prefix_comes_back_while_a_step_runs_without_its_sequence():
    scheduler = make_scheduler(num_blocks=4, host_blocks=8)
    run_alone(scheduler, [1] * 13)
    cached, copies = run_alone(scheduler, [2] * 13)
    assert cached == 0 and sum(len(step.out) for step in copies) == 3
    cached, copies = run_alone(scheduler, [1] * 13)
    assert cached == 12
    assert [len(step.back) for step in copies] == [3, 0], "fetched before the step that uses them"
    assert scheduler.blocks.num_hit_tokens == 12


def test_a_preempted_sequence_is_fetched_instead_of_computed_again():
    scheduler = make_scheduler(num_blocks=6, host_blocks=8, max_num_batched_tokens=32)
    for tokens in ([1] * 9, [2] * 9):
        scheduler.add(make_sequence(tokens, max_tokens=8))
    fetched = 0
    while scheduler.waiting or scheduler.running:
        output = scheduler.schedule()
        fetched += len(output.host_copies.back)
        finish_step(scheduler, output, token=lambda seq: seq.token_ids[0])
    assert scheduler.num_preemptions > 0 and fetched > 0


def test_nothing_is_fetched_where_computing_is_quicker():
    slow = HostTier(4, 4, TransferCosts(block_seconds=5.0, token_seconds=1.0))
    quick = HostTier(4, 4, TransferCosts(block_seconds=1.0, token_seconds=1.0))
    for tier in (slow, quick):
        for number in range(3):
            tier.store(bytes([number]), number)
    digests = [b"\x00", b"\x01", b"\x02", b"\x03"]
    assert slow.count_leading(digests) == 0
    assert quick.count_leading(digests) == 3
    # Three blocks save 9 s and are there one step later.
    quick.step_seconds = 10.0
    assert quick.count_leading(digests) == 0


def test_the_oldest_copy_gives_way_unless_it_is_about_to_be_read():
    tier = HostTier(2, 4, FREE_TRANSFERS)
    tier.store(b"a", 0)
    tier.store(b"b", 1)
    assert tier.take_copies() == HostCopies(((0, 1), (1, 0)), ())
    tier.pin([b"a"])
    tier.store(b"c", 2)
    tier.fetch(b"a", 3)
    copies = tier.take_copies()
    assert copies.out == ((2, 0),) and copies.back == ((1, 3),)
    assert tier.count_leading([b"a"]) == 1 and tier.count_leading([b"b"]) == 0
    tier.check_integrity()


def test_a_copy_is_made_once():
    tier = HostTier(2, 4, FREE_TRANSFERS)
    tier.store(b"a", 0)
    tier.store(b"a", 5)
    assert len(tier.take_copies().out) == 1 and tier.num_used == 1


def test_with_all_copies_pinned_a_block_is_lost():
    tier = HostTier(1, 4, FREE_TRANSFERS)
    tier.store(b"a", 0)
    tier.pin([b"a"])
    tier.store(b"b", 1)
    assert tier.count_leading([b"b"]) == 0
    tier.check_integrity()


def test_a_cpu_refuses_the_setting(tmp_path):
    config = EngineConfig(model=str(write_tiny_llama(tmp_path)), device="cpu", kv_host_memory=1 << 20)
    with pytest.raises(BadRequest, match="kv_host_memory: on a CPU the KV pool lies in host memory already; allowed:"):
        EngineCore(config)
