"""What the next response to one request carries: the same rules for both generation doors.

Knows generations; neither the server's API nor how often a door asks.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from ..errors import TridentError
from ..generation import Generation, Output, Sample

IDLE_SECONDS = 0.3
"""A stream without output for this long gets an empty response: the server notices a closed connection only when
it writes."""


@dataclass(frozen=True)
class Reply:
    """One response: outputs of all samples in order, or an error."""

    outputs: list[Output]
    is_final: bool
    error: TridentError | None = None


class Delivery:
    """One request on its way out. The methods are to be called with the engine client's lock held."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        now = time.monotonic()
        timeout = generation.options.timeout
        self._deadline = now + timeout if timeout else float("inf")
        self._replied_at = now

    @property
    def has_news(self) -> bool:
        """Whether new output of the generation is a reason to collect: a request that does not stream has one
        response, at its end."""
        return self.generation.options.stream or self.generation.finished

    def is_overdue(self, now: float) -> bool:
        """Whether the request's own timeout has passed. ``now``: of the monotonic clock."""
        return now > self._deadline

    def collect(self, now: float) -> Reply | None:
        """Everything since the last reply; None when there is nothing to say yet."""
        generation = self.generation
        if generation.error is not None:
            return Reply([], is_final=True, error=generation.error)
        if not generation.options.stream:
            return Reply(self._full_outputs(), is_final=True) if generation.finished else None
        taken = [generation.take(sample.index) for sample in generation.samples]
        if all(output is None for output in taken) and now - self._replied_at < IDLE_SECONDS:
            return None
        self._replied_at = now
        outputs = [output or _nothing_new(sample) for output, sample in zip(taken, generation.samples, strict=True)]
        return Reply(outputs, is_final=generation.finished)

    def _full_outputs(self) -> list[Output]:
        return [self.generation.full_output(sample.index) for sample in self.generation.samples]


def _nothing_new(sample: Sample) -> Output:
    return sample.output(since_token=sys.maxsize, since_piece=sys.maxsize)
