"""QueueLimit over a scheduler whose steps take a simulated time."""

from __future__ import annotations

import random

import pytest

from trident_llm import EngineConfig
from trident_llm.engine.queue_limit import QueueLimit
from trident_llm.errors import BadRequest, Overloaded

from .helpers import finish_step, make_scheduler, make_sequence

SEATS = 4
STEP_SECONDS = 0.1


class Simulation:
    """An engine whose every step takes ``STEP_SECONDS``, or what the caller says. ``waits``: of all that started."""

    def __init__(self, num_blocks=1000, **settings):
        self.now = 100.0
        self.config = EngineConfig(model="m", max_num_seqs=SEATS, max_queue_size=100, **settings)
        self.scheduler = make_scheduler(
            num_blocks, max_num_seqs=SEATS, max_num_batched_tokens=256, caching=False
        )
        self.limit = QueueLimit(lambda: self.config, self.scheduler, lambda: self.now)
        self.added, self.waits, self.num_busy_seats = {}, [], 0

    def add(self, max_tokens, prompt=(1, 2)):
        self.limit.check(1)
        seq = make_sequence(prompt, max_tokens=max_tokens)
        self.added[seq] = self.now
        self.scheduler.add(seq)

    def try_to_add(self, max_tokens, prompt=(1, 2)):
        places = self.limit.num_places
        try:
            self.add(max_tokens, prompt)
        except Overloaded:
            assert places < 1
        else:
            assert places >= 1

    def step(self, seconds=STEP_SECONDS):
        output = self.scheduler.schedule()
        self.limit.scheduled()
        started = [seq for seq in self.scheduler.running if seq in self.added]
        self.waits += [self.now - self.added.pop(seq) for seq in started]
        self.num_busy_seats += len(self.scheduler.running)
        self.now += seconds
        finish_step(self.scheduler, output)


def overload(simulation, steps, rng, seconds=STEP_SECONDS):
    """Four times what the seats take, answers of 10 tokens on average."""
    for _ in range(steps):
        for _ in range(rng.choice((1, 2))):
            simulation.try_to_add(rng.randint(5, 15))
        simulation.step(seconds)


def test_under_overload_accepted_requests_wait_no_longer_than_allowed_and_no_seat_is_empty():
    rng = random.Random(0)
    simulation = Simulation(max_queue_wait=1.0)
    overload(simulation, 200, rng)
    simulation.waits.clear()
    simulation.num_busy_seats = 0
    overload(simulation, 2000, rng)
    waits = sorted(simulation.waits)
    assert 0.5 < waits[len(waits) // 2] <= 1.0 and waits[int(0.95 * len(waits))] <= 1.5
    assert simulation.num_busy_seats >= 0.99 * SEATS * 2000


def test_the_limit_follows_an_engine_that_becomes_slower():
    rng = random.Random(0)
    simulation = Simulation(max_queue_wait=2.0)
    overload(simulation, 400, rng)
    quick = simulation.scheduler.num_unstarted
    overload(simulation, 400, rng, seconds=5 * STEP_SECONDS)
    simulation.waits.clear()
    overload(simulation, 1000, rng, seconds=5 * STEP_SECONDS)
    assert quick >= 6 and max(simulation.waits) < 6.0
    assert sorted(simulation.waits)[len(simulation.waits) // 2] <= 2.0


def test_a_burst_that_finds_free_seats_is_taken_whole():
    rng = random.Random(0)
    simulation = Simulation(max_queue_wait=0.001)
    overload(simulation, 100, rng)
    while simulation.scheduler.running:
        simulation.step()
    # Nobody has asked for an hour: that is no slow engine.
    simulation.now += 3600
    simulation.step()
    for _ in range(SEATS):
        simulation.add(10)
    simulation.step()
    with pytest.raises(Overloaded, match=r"would wait for about 0.\d s \(max_queue_wait 0.001 s\); retry after 2 s"):
        simulation.add(10)


def test_seats_that_the_pool_does_not_fill_are_not_free():
    simulation = Simulation(num_blocks=8, max_queue_wait=0.5)
    waiting = []
    for _ in range(100):
        simulation.try_to_add(4, prompt=[1] * 12)
        simulation.step()
        waiting.append(simulation.scheduler.num_unstarted)
    # Two at a time for 0.4 s: one ends every 0.2 s.
    assert 190 <= simulation.num_busy_seats <= 200
    assert max(waiting[50:]) == 2


def test_without_the_setting_only_the_number_counts():
    rng = random.Random(0)
    simulation = Simulation()
    overload(simulation, 400, rng)
    assert simulation.scheduler.num_unstarted + len(simulation.scheduler.running) == 100 + SEATS
    assert simulation.limit.num_places == 0
    with pytest.raises(Overloaded, match=r"^\[UNAVAILABLE\] 100 requests are waiting \(max_queue_size 100\)"):
        simulation.limit.check(1)
    with pytest.raises(BadRequest, match=r"n: 105 is not allowed; at most max_queue_size \+ max_num_seqs \(104\)"):
        simulation.limit.check(105)


def test_samples_of_a_request_alone_do_not_wait_for_others():
    rng = random.Random(0)
    simulation = Simulation(max_queue_wait=0.001)
    overload(simulation, 100, rng)
    while simulation.scheduler.running:
        simulation.step()
    simulation.step()
    simulation.limit.check(3 * SEATS)
    simulation.add(10)
    simulation.step()
    with pytest.raises(Overloaded):
        simulation.limit.check(3 * SEATS)
