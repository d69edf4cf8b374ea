"""Times of one streamed answer as its reader sees them. Knows neither locust nor gRPC."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass

from trident_client import Chunk


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds; ``first_token`` and ``total`` count from the start of the request."""

    first_token: float
    gaps: tuple[float, ...]
    """Between successive chunks with tokens, which is what a reader waits; a chunk may carry several tokens."""
    total: float
    num_output_tokens: int
    num_later_tokens: int
    """Tokens after the first chunk: those that came in the time of ``gaps``."""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first chunk; None when one chunk held everything."""
        seconds = sum(self.gaps)
        return self.num_later_tokens / seconds if seconds > 0 else None


def measure(chunks: Iterable[Chunk]) -> Timing:
    """Read an answer to its end and time it."""
    start = time.perf_counter()
    arrivals: list[float] = []
    counts: list[int] = []
    for chunk in chunks:
        if chunk.num_output_tokens:
            arrivals.append(time.perf_counter() - start)
            counts.append(chunk.num_output_tokens)
    total = time.perf_counter() - start
    return Timing(
        first_token=arrivals[0] if arrivals else total,
        gaps=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals)),
        total=total,
        num_output_tokens=sum(counts),
        num_later_tokens=sum(counts[1:]),
    )
