"""Load profiles: how many users, for how long, with which requests, and what counts as passed. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Span:
    """Integers from ``low`` to ``high``, both included; users sample from it uniformly."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"{self.low} to {self.high} is no span of positive integers")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One load. ``limits`` maps an event name to the largest 95th percentile that passes, in milliseconds;
    ``min_tokens_per_second`` is the least median of one stream. Any failed request fails the run."""

    users: int
    spawn_rate: float
    """Users started per second."""
    run_time: int
    """Seconds."""
    prompt_words: Span
    """Words of about one token each."""
    max_tokens: Span
    ignore_eos: bool = False
    """Answers have exactly ``max_tokens`` tokens, so that runs can be compared."""
    pause: float = 0.0
    """Seconds between a user's requests."""
    stop_timeout: int = 30
    """Seconds that requests may take to finish when the run is over."""
    seed: int = 0
    limits: Mapping[str, float] = field(default_factory=dict)
    min_tokens_per_second: float = 0.0
    host: str = "localhost:8001"


PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        users=4,
        spawn_rate=4,
        run_time=15,
        prompt_words=Span(low=4, high=64),
        max_tokens=Span(low=8, high=32),
        pause=0.1,
        limits={"time_to_first_token": 5_000, "time_between_tokens": 2_000, "request": 20_000},
        min_tokens_per_second=2.0,
    ),
    "streams_64": Profile(
        users=64,
        spawn_rate=64,
        run_time=60,
        prompt_words=Span(low=128, high=128),
        max_tokens=Span(low=256, high=256),
        ignore_eos=True,
        stop_timeout=120,
    ),
    "mixed": Profile(
        users=128,
        spawn_rate=64,
        run_time=120,
        prompt_words=Span(low=32, high=512),
        max_tokens=Span(low=32, high=256),
        ignore_eos=True,
        stop_timeout=120,
    ),
}
