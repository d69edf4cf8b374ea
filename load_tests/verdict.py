"""Whether a finished load run passed its profile. Knows numbers only, not where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from load_summary import Summary
    from profiles import Limit, Profile


def shortfalls(profile: Profile, summary: Summary) -> list[str]:
    """What did not pass, in words; empty when all did."""
    requests, failures = sum(summary.requests.values()), sum(summary.failures.values())
    if requests == failures:
        return ["no request was answered"]
    problems = [f"{kind}: no request was answered" for kind in profile.users if kind not in summary.spreads]
    if failures > profile.max_error_rate * requests:
        problems.append(f"{failures} of {requests} requests failed")
    problems += [problem for limit in profile.limits if (problem := _missed(limit, summary))]
    if summary.output_tok_s < profile.min_output_tok_s:
        problems.append(f"{summary.output_tok_s:.1f} output tokens/s are less than {profile.min_output_tok_s:.1f}")
    if summary.held:
        problems.append(f"the engine still held {summary.held} after the last request")
    if summary.engine_restarts:
        problems.append(f"the engine was restarted {summary.engine_restarts} times")
    return problems


def _missed(limit: Limit, summary: Summary) -> str | None:
    spread = summary.spreads.get(limit.kind, {}).get(limit.event)
    if spread is None:
        return f"{limit.name}: not observed"
    value = {0.5: spread.p50, 0.95: spread.p95, 0.99: spread.p99}[limit.quantile]
    return f"{limit.name}: {value:.1f} ms is above {limit.ms:g} ms" if value > limit.ms else None
