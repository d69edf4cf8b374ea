"""Load profiles: which users run, for how long, what they ask for, and what counts as passed. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = (
    "stream",
    "chat",
    "long_prompt",
    "burst",
    "slow_reader",
    "canceller",
    "adapter_mix",
    "wrong_input",
)
"""Kinds of users; the classes of each are in users.py and http_users.py."""
FIRST_TOKEN = "time_to_first_token"
"""Events, all in milliseconds. Time to the first token, from the start of a request."""
BETWEEN_TOKENS = "time_between_tokens"
"""Mean of one answer, after its first chunk."""
LONGEST_GAP = "longest_gap"
"""Longest wait of one answer's reader between two chunks."""
REQUEST = "request"
"""A whole answer."""
CANCELLED = "cancelled"
"""From the request to the moment its client leaves."""
REFUSAL = "refusal"
"""From a request that must be refused to its error."""
QUANTILES = (0.5, 0.95, 0.99)
"""That limits may be about."""
EVENTS = (FIRST_TOKEN, BETWEEN_TOKENS, LONGEST_GAP, REQUEST, CANCELLED, REFUSAL)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Integers from ``low`` to ``high``, both included; users sample from it uniformly."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"{self.low} to {self.high} is no span of positive integers")


@dataclass(frozen=True)
class Limit:
    """The largest value that passes, in milliseconds, of a quantile of one kind of users' events."""

    kind: str
    event: str
    quantile: float
    ms: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.event not in EVENTS or self.quantile not in QUANTILES:
            raise ValueError(f"{self} is no limit of an event")

    @property
    def name(self) -> str:
        return f"{self.kind} {self.event} p{100 * self.quantile:g}"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One load. Besides its limits every run must leave the engine's pool whole and the engine never restarted."""

    users: Mapping[str, int]
    """How many of each kind."""
    spawn_rate: float
    """Users started per second."""
    run_time: int
    """Seconds."""
    prompt_tokens: Span
    max_tokens: Span
    long_prompt_tokens: Span = Span(low=512, high=1024)
    ignore_eos: bool = False
    """Answers have exactly ``max_tokens`` tokens, so that runs can be compared."""
    pause: float = 0.0
    """Mean seconds between a user's requests, drawn from half to one and a half of it."""
    stop_timeout: int = 30
    """Seconds that requests may take to finish when the run is over."""
    limits: tuple[Limit, ...] = ()
    max_error_rate: float = 0.0
    """Share of all requests that may fail."""
    min_output_tok_s: float = 0.0
    """Output tokens a second that clients get, all together, once all users run."""

    def __post_init__(self) -> None:
        unknown = set(self.users) - set(KINDS)
        if unknown or not self.users or min(self.users.values()) < 1:
            raise ValueError(f"{dict(self.users)} are no users of the kinds {', '.join(KINDS)}")
        if any(limit.kind not in self.users for limit in self.limits):
            raise ValueError("a limit is about users that the profile does not have")

    @property
    def num_users(self) -> int:
        return sum(self.users.values())


PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        users=dict.fromkeys(KINDS, 1),
        spawn_rate=8,
        run_time=20,
        prompt_tokens=Span(low=8, high=64),
        max_tokens=Span(low=8, high=32),
        long_prompt_tokens=Span(low=256, high=512),
        pause=0.2,
        limits=(
            Limit("stream", FIRST_TOKEN, 0.95, 5_000),
            Limit("stream", BETWEEN_TOKENS, 0.95, 2_000),
            Limit("chat", FIRST_TOKEN, 0.95, 5_000),
            Limit("chat", REQUEST, 0.95, 20_000),
            Limit("wrong_input", REFUSAL, 0.95, 1_000),
        ),
        min_output_tok_s=5,
    ),
    "soak": Profile(
        users={
            "stream": 2,
            "chat": 3,
            "long_prompt": 1,
            "burst": 1,
            "slow_reader": 2,
            "canceller": 2,
            "adapter_mix": 2,
            "wrong_input": 1,
        },
        spawn_rate=2,
        run_time=1800,
        prompt_tokens=Span(low=8, high=128),
        max_tokens=Span(low=8, high=64),
        pause=1.0,
        stop_timeout=60,
        limits=(
            Limit("stream", FIRST_TOKEN, 0.95, 8_000),
            Limit("chat", FIRST_TOKEN, 0.95, 8_000),
            Limit("stream", BETWEEN_TOKENS, 0.95, 2_000),
            Limit("wrong_input", REFUSAL, 0.95, 1_000),
        ),
        min_output_tok_s=5,
    ),
    "streams_64": Profile(
        users={"stream": 64},
        spawn_rate=64,
        run_time=60,
        prompt_tokens=Span(low=128, high=128),
        max_tokens=Span(low=256, high=256),
        ignore_eos=True,
        stop_timeout=120,
    ),
    "mixed": Profile(
        users={"stream": 128},
        spawn_rate=64,
        run_time=120,
        prompt_tokens=Span(low=32, high=512),
        max_tokens=Span(low=32, high=256),
        ignore_eos=True,
        stop_timeout=120,
    ),
    # The requests are those of bench_server's streams_256, whose 18,132 tokens/s on the H100 the least speed is 90% of.
    "h100": Profile(
        users={"stream": 256},
        spawn_rate=256,
        run_time=300,
        prompt_tokens=Span(low=128, high=128),
        max_tokens=Span(low=256, high=256),
        ignore_eos=True,
        stop_timeout=60,
        limits=(
            Limit("stream", FIRST_TOKEN, 0.99, 2_000),
            Limit("stream", BETWEEN_TOKENS, 0.99, 50),
        ),
        min_output_tok_s=16_300,
    ),
    "h100_cancel": Profile(
        users={"stream": 256, "canceller": 256},
        spawn_rate=256,
        run_time=120,
        prompt_tokens=Span(low=128, high=128),
        max_tokens=Span(low=256, high=256),
        ignore_eos=True,
        pause=1.0,
        stop_timeout=60,
        limits=(
            Limit("stream", FIRST_TOKEN, 0.99, 5_000),
            Limit("canceller", FIRST_TOKEN, 0.99, 5_000),
        ),
    ),
    "h100_mix": Profile(
        users={
            "stream": 96,
            "chat": 64,
            "long_prompt": 16,
            "burst": 4,
            "slow_reader": 16,
            "canceller": 16,
            "adapter_mix": 32,
            "wrong_input": 12,
        },
        spawn_rate=128,
        run_time=300,
        prompt_tokens=Span(low=32, high=512),
        max_tokens=Span(low=32, high=256),
        long_prompt_tokens=Span(low=2048, high=4096),
        ignore_eos=True,
        pause=0.5,
        stop_timeout=60,
        limits=(
            Limit("stream", FIRST_TOKEN, 0.95, 3_000),
            Limit("chat", FIRST_TOKEN, 0.95, 3_000),
            Limit("adapter_mix", FIRST_TOKEN, 0.95, 3_000),
            Limit("wrong_input", REFUSAL, 0.95, 500),
        ),
    ),
}
