"""What lets a load run pass, and how answers are timed."""

import time
from collections.abc import Iterator

import pytest

from load_tests.profiles import PROFILES, Profile, Span
from load_tests.timing import measure
from load_tests.verdict import Observed, shortfalls
from trident_client import Chunk

PROFILE = Profile(
    users=1,
    spawn_rate=1,
    run_time=1,
    prompt_words=Span(low=1, high=1),
    max_tokens=Span(low=1, high=1),
    limits={"time_to_first_token": 100, "request": 1000},
    min_tokens_per_second=10,
)


def events(value: float, num_events: int = 10, num_failures: int = 0) -> Observed:
    return Observed(num_events=num_events, num_failures=num_failures, median=value, percentile_95=value)


GOOD = {"request": events(1000), "time_to_first_token": events(100), "tokens_per_second": events(10)}


def test_a_run_within_its_limits_passes():
    assert shortfalls(PROFILE, GOOD) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"request": events(500, num_failures=1)}, "1 of 10 requests failed"),
        ({"request": events(1001)}, "request: 95th percentile 1001 ms is above 1000 ms"),
        ({"time_to_first_token": events(101)}, "time_to_first_token: 95th percentile 101 ms is above 100 ms"),
        ({"tokens_per_second": events(9)}, "tokens_per_second: median 9.0 is below 10.0"),
    ],
)
def test_each_limit_is_checked(change: dict[str, Observed], words: str):
    assert shortfalls(PROFILE, {**GOOD, **change}) == [words]


@pytest.mark.parametrize("observed", [{}, {"request": events(1, num_events=3, num_failures=3)}])
def test_a_run_without_answers_fails(observed: dict[str, Observed]):
    assert shortfalls(PROFILE, observed) == ["no request was answered"]


def test_what_was_not_observed_fails():
    problems = shortfalls(PROFILE, {"request": events(1)})
    assert problems == ["time_to_first_token: not observed", "tokens_per_second: median 0.0 is below 10.0"]


def test_every_profile_ends_by_itself_and_asks_for_something():
    for profile in PROFILES.values():
        assert profile.users > 0 and profile.run_time > 0
    with pytest.raises(ValueError, match="5 to 4"):
        Span(low=5, high=4)


def test_an_answer_is_timed_by_its_tokens():
    def chunks() -> Iterator[Chunk]:
        time.sleep(0.1)
        yield Chunk(text="ab", num_output_tokens=2)
        time.sleep(0.2)
        yield Chunk(text="cde", num_output_tokens=3)
        yield Chunk(text="", num_output_tokens=0, finish_reason="stop")

    timing = measure(chunks())
    assert timing.first_token >= 0.1
    assert len(timing.gaps) == 1 and timing.gaps[0] >= 0.2
    assert timing.total >= timing.first_token + timing.gaps[0]
    assert timing.num_output_tokens == 5
    assert timing.tokens_per_second == pytest.approx(3 / timing.gaps[0])


def test_an_answer_in_one_chunk_has_no_speed():
    timing = measure(iter([Chunk(text="a", num_output_tokens=1, finish_reason="stop")]))
    assert timing.gaps == ()
    assert timing.tokens_per_second is None
