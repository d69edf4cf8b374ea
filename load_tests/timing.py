"""Streamed answers as their readers see them. Knows neither locust nor gRPC."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trident_client import Chunk


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One whole answer. Seconds; ``first_token`` and ``total`` count from the start of the request."""

    text: str
    finish_reason: str | None
    first_token: float
    gaps: tuple[float, ...]
    """Between successive chunks with tokens, which is what a reader waits; a chunk may carry several tokens."""
    total: float
    num_output_tokens: int
    num_later_tokens: int
    """Tokens after the first chunk: those that came in the time of ``gaps``."""

    @property
    def between_tokens(self) -> float | None:
        """Mean seconds a token after the first chunk; None when one chunk held everything."""
        return sum(self.gaps) / self.num_later_tokens if self.gaps else None


def read_answer(chunks: Iterable[Chunk], on_tokens: Callable[[int], None] = lambda count: None) -> Answer:
    """Read an answer to its end and time it. ``on_tokens`` gets the number of tokens of each chunk when it comes."""
    start = time.perf_counter()
    texts: list[str] = []
    arrivals: list[float] = []
    counts: list[int] = []
    finish_reason = None
    for chunk in chunks:
        texts.append(chunk.text)
        finish_reason = chunk.finish_reason or finish_reason
        if chunk.num_output_tokens:
            arrivals.append(time.perf_counter() - start)
            counts.append(chunk.num_output_tokens)
            on_tokens(chunk.num_output_tokens)
    total = time.perf_counter() - start
    return Answer(
        text="".join(texts),
        finish_reason=finish_reason,
        first_token=arrivals[0] if arrivals else total,
        gaps=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals)),
        total=total,
        num_output_tokens=sum(counts),
        num_later_tokens=sum(counts[1:]),
    )
