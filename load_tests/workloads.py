"""Workloads for the engine in this process: requests of random tokens, greedy, without end-of-sequence.

Every run gets fresh prompts, so that no cache helps. Times are wall-clock seconds.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trident_llm.engine.engine import EngineCore
from trident_llm.protocol import SamplingParams, Submit

_names = itertools.count()


@dataclass(frozen=True)
class Shape:
    """One request: tokens in, tokens out."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Timing:
    """``first_token`` is the time to the first token of any request, ``total`` to the end of the last."""

    first_token: float
    total: float
    output_tokens: int


def mixed_shapes(count: int = 1000) -> list[Shape]:
    """Prompts of 32 to 512 and outputs of 32 to 256 tokens, lengths from seed 0: the same on every run."""
    lengths = random.Random(0)
    return [Shape(lengths.randint(32, 512), lengths.randint(32, 256)) for _ in range(count)]


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(10, vocab_size) for _ in range(length)]


def submits_of(prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> list[Submit]:
    """Greedy requests that end with their last token only."""
    return [
        Submit(
            request_id=f"bench-{next(_names)}",
            prompt_ids=prompt,
            params=SamplingParams(seed=0, max_tokens=count, temperature=0.0, ignore_eos=True),
        )
        for prompt, count in zip(prompts, new_tokens, strict=True)
    ]


def run(core: EngineCore, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> Timing:
    """Submit all at once and step until the last one ends."""
    submits = submits_of(prompts, new_tokens)
    begin = time.perf_counter()
    for submit in submits:
        core.add(submit)
    first, output_tokens = 0.0, 0
    while core.has_work():
        produced = sum(len(delta.token_ids) for delta in core.step())
        if produced and not output_tokens:
            first = time.perf_counter() - begin
        output_tokens += produced
    return Timing(first, time.perf_counter() - begin, output_tokens)


class Bench:
    """Runs workloads on one engine with fresh random prompts each time."""

    def __init__(self, core: EngineCore, seed: int = 0) -> None:
        self.core = core
        self._rng = random.Random(seed)
        self._vocab_size = core.welcome("bench").vocab_size

    def prompts(self, shapes: Sequence[Shape]) -> list[list[int]]:
        return [random_prompt(self._rng, shape.prompt_tokens, self._vocab_size) for shape in shapes]

    def run(self, shapes: Sequence[Shape]) -> Timing:
        return run(self.core, self.prompts(shapes), [shape.new_tokens for shape in shapes])

    def one_stream(self, prompt_tokens: int = 128, new_tokens: int = 256) -> float:
        """Tokens/s of a lone stream after its first token."""
        whole = self.run([Shape(prompt_tokens, new_tokens + 1)]).total
        first = self.run([Shape(prompt_tokens, 1)]).total
        return new_tokens / (whole - first)

    def first_token_ms(self, prompt_tokens: int) -> float:
        """Milliseconds from submission to the first token of a lone request."""
        return self.run([Shape(prompt_tokens, 1)]).total * 1e3

    def streams(self, count: int, prompt_tokens: int = 128, new_tokens: int = 256) -> float:
        """Output tokens/s of ``count`` equal requests that arrive together."""
        timing = self.run([Shape(prompt_tokens, new_tokens)] * count)
        return timing.output_tokens / timing.total

    def mixed(self, count: int = 1000) -> float:
        """Requests/s of ``mixed_shapes``."""
        return count / self.run(mixed_shapes(count)).total


WORKLOADS: dict[str, tuple[str, Callable[[Bench], float]]] = {
    "one_stream": ("output_tok_s", lambda bench: bench.one_stream()),
    "first_token_128": ("ms", lambda bench: bench.first_token_ms(128)),
    "first_token_2048": ("ms", lambda bench: bench.first_token_ms(2048)),
    "streams_64": ("output_tok_s", lambda bench: bench.streams(64)),
    "streams_256": ("output_tok_s", lambda bench: bench.streams(256)),
    "mixed_1000": ("req_s", lambda bench: bench.mixed(1000)),
    "streams_1000": ("output_tok_s", lambda bench: bench.streams(1000, new_tokens=64)),
}
"""Name, metric and measurement of each standard workload."""
