"""LiveText: tokens of requests that asked to be calibrated on, in memory alone, bounded in number and length."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

from ..errors import BadRequest

MAX_SAMPLES, MAX_LENGTH = 8192, 8192
"""Most requests and tokens of each, which bounds what is kept to 256 MiB."""
DEFAULT_SAMPLES, DEFAULT_LENGTH = 1024, 2048


class LiveText:
    """An even sample of what is offered between ``start`` and ``stop`` (reservoir sampling, Vitter 1985)."""

    def __init__(self) -> None:
        self.is_collecting = False
        self._max_samples = self._max_length = 0
        self._samples: list[array[int]] = []
        self._num_offered = 0
        self._random = random.Random(0)

    def start(self, max_samples: int = DEFAULT_SAMPLES, max_length: int = DEFAULT_LENGTH) -> dict[str, Any]:
        """Forget what there is and collect anew. Raises ``BadRequest``."""
        for name, value, most in (("max_samples", max_samples, MAX_SAMPLES), ("max_length", max_length, MAX_LENGTH)):
            if not 1 <= value <= most:
                raise BadRequest(f"{name}: {value} is not allowed; give an integer from 1 to {most}")
        self.clear()
        self.is_collecting, self._max_samples, self._max_length = True, max_samples, max_length
        return self.describe()

    def stop(self) -> dict[str, Any]:
        """Collect no more; what there is stays until ``clear``, or ``start``."""
        self.is_collecting = False
        return self.describe()

    def clear(self) -> None:
        self.is_collecting = False
        self._samples, self._num_offered = [], 0

    def offer(self, token_ids: Sequence[int]) -> None:
        """The prompt and output of a request that has agreed."""
        if not self.is_collecting:
            return
        self._num_offered += 1
        sample = array("i", token_ids[: self._max_length])
        if len(self._samples) < self._max_samples:
            self._samples.append(sample)
        elif (place := self._random.randrange(self._num_offered)) < self._max_samples:
            self._samples[place] = sample

    def token_ids(self) -> array[int]:
        """All samples, one after another."""
        joined = array("i")
        for sample in self._samples:
            joined += sample
        return joined

    def describe(self) -> dict[str, Any]:
        return {
            "collecting": self.is_collecting,
            "requests": self._num_offered,
            "samples": len(self._samples),
            "tokens": sum(map(len, self._samples)),
        }
