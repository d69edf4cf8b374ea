"""What lets a load run pass, and how answers are timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from load_summary import Spread, Summary
from profiles import FIRST_TOKEN, KINDS, PROFILES, REQUEST, Limit, Profile, Span
from timing import read_answer
from verdict import shortfalls

from trident_client import Chunk

PROFILE = Profile(
    users={"stream": 1},
    spawn_rate=1,
    run_time=1,
    prompt_tokens=Span(low=1, high=1),
    max_tokens=Span(low=1, high=1),
    limits=(Limit("stream", FIRST_TOKEN, 0.99, 100), Limit("stream", REQUEST, 0.5, 1000)),
    min_output_tok_s=10,
)


def spread(value: float) -> Spread:
    return Spread.of([value] * 10)


def summary(first_token: float = 100, request: float = 1000, **changes: Any) -> Summary:
    good: dict[str, Any] = {
        "profile": "test", "seconds": 1.0, "requests": {"stream": 10}, "failures": {}, "errors": {},
        "spreads": {"stream": {FIRST_TOKEN: spread(first_token), REQUEST: spread(request)}}, "output_tokens": 10,
        "engine_output_tokens": 10, "output_tok_s": 10.0, "engine_output_tok_s": 10.0, "kv_peak_share": 0.5,
        "running_peak": 1, "waiting_peak": 0, "preemptions": 0, "prefix_hit_share": 0.0, "engine_restarts": 0,
        "held": {}, "cores": {},
    }  # fmt: skip
    return Summary(**{**good, **changes})


def test_a_run_within_its_limits_passes() -> None:
    assert shortfalls(PROFILE, summary()) == []


@pytest.mark.parametrize(
    ("missed", "words"),
    [
        (summary(first_token=101), "stream time_to_first_token p99: 101.0 ms is above 100 ms"),
        (summary(request=1001), "stream request p50: 1001.0 ms is above 1000 ms"),
        (summary(failures={"stream": 1}), "1 of 10 requests failed"),
        (summary(output_tok_s=9.9), "9.9 output tokens/s are less than 10.0"),
        (summary(held={"kv_blocks_used": 3}), "the engine still held {'kv_blocks_used': 3} after the last request"),
        (summary(engine_restarts=1), "the engine was restarted 1 times"),
    ],
)
def test_each_limit_is_checked(missed: Summary, words: str) -> None:
    assert shortfalls(PROFILE, missed) == [words]


@pytest.mark.parametrize(("requests", "failures"), [({}, {}), ({"stream": 3}, {"stream": 3})])
def test_a_run_without_answers_fails(requests: dict[str, int], failures: dict[str, int]) -> None:
    assert shortfalls(PROFILE, summary(requests=requests, failures=failures)) == ["no request was answered"]


def test_each_kind_of_user_must_have_been_answered() -> None:
    profile = replace(PROFILE, users={"stream": 1, "chat": 1})
    assert shortfalls(profile, summary()) == ["chat: no request was answered"]


def test_what_was_not_observed_fails() -> None:
    problems = shortfalls(PROFILE, summary(spreads={"stream": {REQUEST: spread(1)}}))
    assert problems == ["stream time_to_first_token p99: not observed"]


def test_some_errors_may_be_allowed() -> None:
    profile = replace(PROFILE, max_error_rate=0.1)
    assert shortfalls(profile, summary(failures={"stream": 1})) == []
    assert shortfalls(profile, summary(failures={"stream": 2})) == ["2 of 10 requests failed"]


def test_profiles_are_checked() -> None:
    assert set(PROFILES["smoke"].users) == set(PROFILES["soak"].users) == set(PROFILES["h100_mix"].users) == set(KINDS)
    assert (PROFILES["h100"].num_users, PROFILES["h100"].run_time) == (256, 300)
    assert PROFILES["h100_cancel"].users == {"stream": 256, "canceller": 256}
    with pytest.raises(ValueError, match="5 to 4"):
        Span(low=5, high=4)
    with pytest.raises(ValueError, match="no limit"):
        Limit("stream", "no_event", 0.5, 1)
    with pytest.raises(ValueError, match="no users"):
        replace(PROFILE, users={"nobody": 1})
    with pytest.raises(ValueError, match="does not have"):
        replace(PROFILE, users={"chat": 1})


def test_quantiles_are_nearest_ranks() -> None:
    assert Spread.of([float(value) for value in range(100, 0, -1)]) == Spread(
        count=100, p50=50.0, p95=95.0, p99=99.0, longest=100.0
    )


def test_an_answer_is_timed_by_its_tokens() -> None:
    def chunks() -> Iterator[Chunk]:
        time.sleep(0.1)
        yield Chunk(text="ab", num_output_tokens=2)
        time.sleep(0.2)
        yield Chunk(text="cde", num_output_tokens=3)
        yield Chunk(text="", num_output_tokens=0, finish_reason="stop")

    counts: list[int] = []
    answer = read_answer(chunks(), counts.append)
    assert answer.first_token >= 0.1
    assert len(answer.gaps) == 1 and answer.gaps[0] >= 0.2
    assert answer.total >= answer.first_token + answer.gaps[0]
    assert (answer.text, answer.finish_reason, answer.num_output_tokens, counts) == ("abcde", "stop", 5, [2, 3])
    assert answer.between_tokens == pytest.approx(answer.gaps[0] / 3)


def test_an_answer_in_one_chunk_has_no_speed() -> None:
    answer = read_answer(iter([Chunk(text="a", num_output_tokens=1, finish_reason="stop")]))
    assert answer.gaps == ()
    assert answer.between_tokens is None
