"""Whether a finished load run passed its profile. Knows numbers only, not where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from load_tests.profiles import Profile


@dataclass(frozen=True, kw_only=True)
class Observed:
    """All events of one name; times in milliseconds."""

    num_events: int
    num_failures: int
    median: float
    percentile_95: float


def shortfalls(profile: Profile, observed: Mapping[str, Observed]) -> list[str]:
    """What did not pass, in words; empty when all did. ``observed`` is keyed by event name."""
    requests = observed.get("request")
    if requests is None or requests.num_events == requests.num_failures:
        return ["no request was answered"]
    problems = []
    if requests.num_failures:
        problems.append(f"{requests.num_failures} of {requests.num_events} requests failed")
    for name, limit in profile.limits.items():
        if name not in observed:
            problems.append(f"{name}: not observed")
        elif observed[name].percentile_95 > limit:
            problems.append(f"{name}: 95th percentile {observed[name].percentile_95:.0f} ms is above {limit:.0f} ms")
    if profile.min_tokens_per_second:
        speed = observed["tokens_per_second"].median if "tokens_per_second" in observed else 0.0
        if speed < profile.min_tokens_per_second:
            problems.append(f"tokens_per_second: median {speed:.1f} is below {profile.min_tokens_per_second:.1f}")
    return problems
