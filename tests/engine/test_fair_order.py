"""Users share the engine when there is not room for all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trident_llm.engine.fair_order import in_turn
from trident_llm.engine.sequence import Sequence, Status
from trident_llm.protocol import SamplingParams


def waiting(user: str, arrival: int, priority: int = 0) -> Sequence:
    return Sequence(
        request_id=f"{user}{arrival}",
        sample_index=0,
        token_ids=[1],
        num_prompt_tokens=1,
        params=SamplingParams(seed=0, max_tokens=4),
        max_total_tokens=5,
        stop_ids=frozenset(),
        arrival=arrival,
        priority=priority,
        user=user,
    )


def admitted(sequences: list[Sequence], running: list[Sequence], room: int) -> list[str]:
    """Whom a scheduler admits that has room for so many."""
    names = []
    for seq in in_turn(sorted(sequences, key=lambda seq: seq.order), running):
        if len(names) == room:
            break
        seq.status = Status.RUNNING
        names.append(seq.request_id)
    return names


def test_one_user_with_many_requests_leaves_room_for_others():
    flood = [waiting("flood", arrival) for arrival in range(10)]
    assert admitted([*flood, waiting("a", 10), waiting("b", 11)], [], 4) == ["flood0", "a10", "b11", "flood1"]


def test_what_runs_already_counts():
    running = [waiting("a", 0), waiting("a", 1), waiting("b", 2)]
    sequences = [waiting("a", 3), waiting("b", 4), waiting("c", 5), waiting("c", 6)]
    assert admitted(sequences, running, 4) == ["c5", "b4", "c6", "a3"]


def test_urgency_comes_before_fairness():
    sequences = [waiting("flood", arrival, priority=-1) for arrival in range(3)]
    assert admitted([*sequences, waiting("a", 4)], [], 4) == ["flood0", "flood1", "flood2", "a4"]


def test_a_user_whose_first_cannot_run_is_not_charged_for_it():
    sequences = [waiting("a", 0), waiting("a", 1), waiting("b", 2)]
    order = []
    for seq in in_turn(sequences, []):
        order.append(seq.request_id)
        seq.status = Status.WAITING if seq.request_id == "a0" else Status.RUNNING
    assert order == ["a0", "a1", "b2"]


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(-1, 1)), max_size=12))
def test_everyone_has_a_turn(rows: list[tuple[str, int]]):
    sequences = [waiting(user, arrival, priority) for arrival, (user, priority) in enumerate(rows)]
    assert sorted(admitted(sequences, [], len(rows))) == sorted(seq.request_id for seq in sequences)
    if not any(user for user, _ in rows):
        fresh = [waiting(user, arrival, priority) for arrival, (user, priority) in enumerate(rows)]
        ordered = sorted(fresh, key=lambda seq: seq.order)
        assert admitted(fresh, [], len(rows)) == [seq.request_id for seq in ordered]
