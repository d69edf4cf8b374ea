"""Who is blamed for the engine's deaths, and when they count as a loop."""

from __future__ import annotations

import pytest

from trident_llm.deaths import Deaths


def die(deaths: Deaths, *requests: str, steps: int = 1, blames: bool = True) -> Deaths:
    return deaths.after(requests, num_completed=steps, blames_requests=blames)


def test_who_was_there_twice_is_a_suspect_and_only_a_death_alone_condemns():
    deaths = die(Deaths(), "a-1", "b-1", "c-1")
    assert not deaths.suspects
    deaths = die(deaths, "a-1.1", "b-1.1", "d-1")
    assert deaths.suspects == {"a-1", "b-1"} and not deaths.condemned
    deaths = die(deaths.acquit("a-1.2"), "b-1.2")
    assert deaths.condemned == {"b-1": 3}
    assert not deaths.suspects
    assert deaths.counts == {"c-1": 1, "d-1": 1}


def test_one_death_alone_is_an_accident():
    assert not die(Deaths(), "a").condemned
    assert die(die(Deaths(), "a"), "a.1").condemned == {"a": 2}


def test_a_signal_from_outside_blames_nobody():
    deaths = die(die(die(Deaths(), "a", blames=False), "a", blames=False), "a", blames=False)
    assert deaths == Deaths(total=3)


def test_a_death_between_steps_blames_nobody():
    assert die(die(Deaths())).counts == {}


@pytest.mark.parametrize(
    ("steps", "in_a_row"), [([0, 0, 0], 3), ([5, 0, 0], 2), ([0, 0, 1], 0), ([0, 1, 0], 1), ([1, 1, 1], 0)]
)
def test_deaths_in_a_row_are_those_without_a_step(steps: list[int], in_a_row: int):
    deaths = Deaths()
    for num_steps in steps:
        deaths = die(deaths, steps=num_steps)
    assert (deaths.in_a_row, deaths.total) == (in_a_row, 3)


def test_a_loop_whose_cause_is_found_is_none():
    deaths = die(die(Deaths(), "a", "b", steps=0), "a", "b", steps=0)
    assert deaths.in_a_row == 2
    deaths = die(deaths, "a", steps=0)
    assert deaths.in_a_row == 0 and deaths.condemned == {"a": 3}
    assert die(deaths, "b", steps=0).in_a_row == 0


def test_memory_of_requests_is_bounded():
    deaths = Deaths()
    for number in range(12):
        deaths = die(deaths, *(f"{number}-{index}" for index in range(1000)))
    assert len(deaths.counts) == 10_000
    assert "11-5" in deaths.counts and "0-5" not in deaths.counts
