"""What requests went through in the engine: histograms of waits, times per token and lengths, and use of adapters.

Tokens of one step share its end, so most of them share the time since the token before: they are counted by that, and
sorted into buckets once a step. Knows neither doors nor how metrics are published.
"""

from __future__ import annotations

import bisect
import time
from collections import defaultdict
from typing import Any

from ..metrics_catalog import HISTOGRAMS
from .adapter_usage import AdapterUsage, AdapterUsages
from .sequence import Sequence


class Histogram:
    """Counts per bucket, the last one for what is beyond all ``bounds``."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self._bounds, value)] += times
        self.sum += value * times


class RequestMetrics:
    """All times are of the monotonic clock, which the processes of one machine share."""

    def __init__(self) -> None:
        self._gaps: defaultdict[float, int] = defaultdict(int)
        """Tokens of this step by the time of the token before."""
        self.adapters = AdapterUsages()
        self.clear()

    def clear(self) -> None:
        """Forget everything, such as the test that comes before readiness."""
        self._histograms = {spec.name: Histogram(spec.buckets) for spec in HISTOGRAMS}
        self.adapters.clear()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """``counts`` (not cumulative) and ``sum`` of each histogram, by its name."""
        return {name: {"counts": list(h.counts), "sum": h.sum} for name, h in self._histograms.items()}

    def added(self, num_samples: int, usages: tuple[AdapterUsage, ...] = ()) -> None:
        """A new request, not one that is submitted again, and what it takes of adapters."""
        self._observe("request_params_n", num_samples)
        for usage in usages:
            usage.requests += 1

    def token(self, seq: Sequence, now: float) -> None:
        """Call before the token is appended; ``now`` is the end of its step."""
        if seq.last_token_at:
            self._gaps[seq.last_token_at] += 1
        else:
            seq.first_token_at = now
            if seq.num_output_tokens == 0:
                self._first_token(seq, now)
        seq.last_token_at = now
        for usage in seq.usages:
            usage.generated_tokens += 1

    def end_step(self, now: float, num_tokens: int) -> None:
        """``now``: what the step's calls of ``token`` had. ``num_tokens``: computed by it, prompts included."""
        self._observe("iteration_tokens_total", num_tokens)
        for last_token_at, times in self._gaps.items():
            self._observe("time_per_output_token_seconds", now - last_token_at, times)
        self._gaps.clear()

    def finished(self, seq: Sequence) -> None:
        """A sequence is complete: by length, a stop token, or a stop string that its door has found."""
        now = seq.last_token_at or time.monotonic()
        self._observe("e2e_request_latency_seconds", now - seq.requested_at)
        self._observe("request_prompt_tokens", seq.num_prompt_tokens)
        self._observe("request_generation_tokens", seq.num_output_tokens)
        if seq.last_token_at:
            self._observe("request_decode_time_seconds", seq.last_token_at - seq.first_token_at)
            self._observe("request_inference_time_seconds", seq.last_token_at - seq.started_at)

    def _first_token(self, seq: Sequence, now: float) -> None:
        self._observe("time_to_first_token_seconds", now - seq.requested_at)
        self._observe("request_queue_time_seconds", seq.started_at - seq.arrival_time)
        self._observe("request_prefill_time_seconds", now - seq.started_at)

    def _observe(self, name: str, value: float, times: int = 1) -> None:
        self._histograms[name].observe(value, times)
