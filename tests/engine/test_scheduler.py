from trident_llm.engine.sequence import Status

from .helpers import finish_step, make_scheduler, make_sequence


def run(scheduler, steps=200):
    """Step until nothing is left; returns the number of steps."""
    for step in range(steps):
        if not scheduler.waiting and not scheduler.running:
            return step
        finish_step(scheduler, scheduler.schedule())
    raise AssertionError("the scheduler did not finish")


def test_long_prompts_are_computed_in_chunks_beside_decodes():
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=8)
    short, long = make_sequence([1, 2]), make_sequence(list(range(30)))
    scheduler.add(short)
    finish_step(scheduler, scheduler.schedule())
    scheduler.add(long)
    output = scheduler.schedule()
    assert [(item.seq, item.num_tokens) for item in output.scheduled] == [(short, 1), (long, 7)]
    assert [item.sampled for item in output.scheduled] == [(short,), ()]
    assert output.num_tokens == 8


def test_the_prompt_is_reserved_at_admission():
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=4)
    first, second = make_sequence([1] * 20), make_sequence([2] * 20)
    scheduler.add(first)
    scheduler.add(second)
    output = scheduler.schedule()
    assert [item.seq for item in output.scheduled] == [first] and len(first.block_table) == 5
    assert second.status is Status.WAITING


def test_growth_preempts_the_newest_and_both_finish():
    scheduler = make_scheduler(num_blocks=5, caching=False)
    first, second = make_sequence([1] * 6, max_tokens=10), make_sequence([2] * 6, max_tokens=10)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler)
    assert scheduler.num_preemptions > 0
    assert first.token_ids == [1] * 6 + list(range(6, 16))
    assert second.token_ids == [2] * 6 + list(range(6, 16))
    assert scheduler.blocks.num_free == 5


def test_urgent_requests_run_first_and_are_preempted_last():
    scheduler = make_scheduler(num_blocks=5, caching=False, max_num_seqs=2)
    casual, urgent = make_sequence([1] * 6, priority=1, max_tokens=9), make_sequence([2] * 6, priority=-1, max_tokens=9)
    scheduler.add(casual)
    scheduler.add(urgent)
    assert scheduler.waiting == [urgent, casual]
    finished = []
    while scheduler.running or scheduler.waiting:
        finished += finish_step(scheduler, scheduler.schedule())
    assert finished == [urgent, casual] and scheduler.num_preemptions > 0


def test_forks_start_when_the_prompt_is_done_and_get_a_token_from_its_logits():
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=4)
    parent = make_sequence([1] * 6)
    parent.forks = [make_sequence([1] * 6) for _ in range(2)]
    forks = list(parent.forks)
    scheduler.add(parent)
    assert scheduler.schedule().scheduled[0].sampled == ()
    output = scheduler.schedule()
    assert output.scheduled[0].sampled == (parent, *forks)
    finish_step(scheduler, output)
    output = scheduler.schedule()
    assert len(output.scheduled) == 3 and len(output.block_copies) == 2
    finish_step(scheduler, output)
    run(scheduler)
    assert scheduler.blocks.num_used == 0


def test_forks_beyond_the_sequence_limit_wait_for_their_turn():
    scheduler = make_scheduler(num_blocks=32, max_num_seqs=2)
    parent = make_sequence([1] * 6)
    parent.forks = forks = [make_sequence([1] * 6) for _ in range(3)]
    scheduler.add(parent)
    run(scheduler)
    assert all(len(seq.token_ids) == 14 for seq in (parent, *forks))
    assert scheduler.peak_running == 2


def test_a_prompt_that_another_is_computing_is_shared_not_repeated():
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=8)
    first, same, other = make_sequence([1] * 17), make_sequence([1] * 17), make_sequence([2] * 3)
    for seq in (first, same, other):
        scheduler.add(seq)
    output = scheduler.schedule()
    assert [item.seq for item in output.scheduled] == [first]
    finish_step(scheduler, output)
    output = scheduler.schedule()
    assert [(item.seq, item.num_tokens) for item in output.scheduled] == [(first, 8)]
    finish_step(scheduler, output)
    output = scheduler.schedule()
    # One token of the first is left; the second starts behind its 16, and the third was not held up.
    assert [(item.seq, item.num_tokens) for item in output.scheduled] == [(first, 1), (same, 1), (other, 3)]
    assert same.block_table[:4] == first.block_table[:4]
    finish_step(scheduler, output)
    run(scheduler)


def test_who_waits_for_a_prompt_goes_on_when_it_is_given_up():
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=8)
    first, same = make_sequence([1] * 17), make_sequence([1] * 17)
    scheduler.add(first)
    scheduler.add(same)
    finish_step(scheduler, scheduler.schedule())
    scheduler.finish(first)
    output = scheduler.schedule()
    assert [(item.seq, item.start) for item in output.scheduled] == [(same, 8)]
    finish_step(scheduler, output)
    run(scheduler)


def test_a_sliding_window_gives_blocks_back_while_the_sequence_runs():
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_num_batched_tokens=8, window=6)
    seq = make_sequence([1] * 17, max_tokens=100)
    scheduler.add(seq)
    used = []
    while scheduler.running or scheduler.waiting:
        output = scheduler.schedule()
        finish_step(scheduler, output)
        used.append(scheduler.blocks.num_used)
    assert len(seq.token_ids) == 117
    # A window of 6 tokens touches at most 3 blocks of 4.
    assert max(used[4:]) == 3


def test_aborting_a_parent_leaves_its_forks():
    scheduler = make_scheduler(num_blocks=16)
    parent = make_sequence([1] * 6)
    parent.forks = forks = [make_sequence([1] * 6) for _ in range(2)]
    scheduler.add(parent)
    scheduler.finish(forks[1])
    scheduler.finish(parent)
    assert scheduler.waiting == [forks[0]] and forks[0].forks == []
    run(scheduler)
    assert len(forks[0].token_ids) == 14 and len(forks[1].token_ids) == 6


def test_requests_that_waited_too_long_are_taken_out():
    scheduler = make_scheduler(num_blocks=4)
    runs, waits = make_sequence([1] * 14), make_sequence([2] * 14)
    waits.forks = [make_sequence([2] * 14)]
    scheduler.add(runs)
    scheduler.schedule()
    scheduler.add(waits)
    assert scheduler.expire(60.0) == []
    waits.arrival_time -= 61
    assert len(scheduler.expire(60.0)) == 2 and scheduler.waiting == []


def test_users_share_the_places_when_there_are_not_enough():
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=4)
    flood = [make_sequence([number], max_tokens=20) for number in range(8)]
    others = [make_sequence([20 + number], max_tokens=20) for number in range(2)]
    for user, sequences in (("flood", flood), ("a", others[:1]), ("b", others[1:])):
        for seq in sequences:
            seq.user = user
            scheduler.add(seq)
    scheduler.schedule()
    assert set(scheduler.running) == {*flood[:2], *others}
