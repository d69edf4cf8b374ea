"""How much a KV cache holds: scheduler and block manager with chat-like lengths and a model that takes no time.

Counts steps, sequences, blocks and tokens; knows neither seconds nor tensors. A static cache is the same scheduler
with as many sequences at most as it has places, each of which takes ``MAX_MODEL_LEN`` tokens whatever it holds.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from pathlib import Path

from trident_llm.engine.block_manager import BlockManager
from trident_llm.engine.scheduler import Scheduler, SchedulerOutput
from trident_llm.engine.sequence import Sequence
from trident_llm.protocol import SamplingParams

LENGTHS = Path(__file__).parent / "chat_lengths.json"
MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16
MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 2048
WARM_UP = 500
"""Steps after which sequences of all ages run; before, all are young and small, and more of them fit."""


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithm is normal, as those of chats nearly are: many short ones and a long tail."""

    median: float
    sigma: float

    def draw(self, rng: random.Random) -> int:
        return max(1, round(self.median * rng.lognormvariate(0.0, self.sigma)))


@dataclass(frozen=True)
class ChatLength:
    """Tokens of one request, history of the conversation included in the prompt."""

    prompt: int
    output: int


PROMPTS = LogNormal(median=150, sigma=1.0)
OUTPUTS = LogNormal(median=200, sigma=0.7)


def draw_lengths(count: int, seed: int) -> list[ChatLength]:
    """Lengths of ``PROMPTS`` and ``OUTPUTS``, independent of each other, that fit ``MAX_MODEL_LEN``."""
    rng = random.Random(seed)
    lengths: list[ChatLength] = []
    while len(lengths) < count:
        drawn = ChatLength(PROMPTS.draw(rng), OUTPUTS.draw(rng))
        if drawn.prompt + drawn.output <= MAX_MODEL_LEN:
            lengths.append(drawn)
    return lengths


def write_lengths(path: Path = LENGTHS, count: int = 2000, seed: int = 0) -> None:
    pairs = [[length.prompt, length.output] for length in draw_lengths(count, seed)]
    about = {"seed": seed, "prompts": vars(PROMPTS), "outputs": vars(OUTPUTS), "most": MAX_MODEL_LEN}
    path.write_text(json.dumps({"drawn_from": about, "prompt_and_output_tokens": pairs}) + "\n")


def read_lengths(path: Path = LENGTHS) -> list[ChatLength]:
    return [ChatLength(*pair) for pair in json.loads(path.read_text())["prompt_and_output_tokens"]]


@dataclass(frozen=True)
class Moment:
    """The cache after one step was scheduled; ``allocated`` and ``computed`` in tokens, of running sequences."""

    num_running: int
    num_waiting: int
    allocated: int
    computed: int


@dataclass(frozen=True)
class Usage:
    """A run to its end."""

    moments: tuple[Moment, ...]
    num_preemptions: int
    num_computed_tokens: int
    """Those computed again after a preemption included."""

    @property
    def mean_running(self) -> float:
        """Sequences that ran at once after the warm-up, while somebody waited."""
        return statistics.fmean(moment.num_running for moment in self.moments[WARM_UP:] if moment.num_waiting)

    @property
    def waste(self) -> float:
        """Share of the memory allocated to running sequences that held no token, over all steps."""
        allocated = sum(moment.allocated for moment in self.moments)
        return 1 - sum(moment.computed for moment in self.moments) / allocated


class Simulation:
    """``lengths`` through a scheduler, at most ``concurrency`` of them at a time.

    A step's tokens are known when the next step has been scheduled, as with the engine's lookahead on a GPU.
    """

    def __init__(self, scheduler: Scheduler, lengths: ListOf[ChatLength], concurrency: int | None = None) -> None:
        self.scheduler = scheduler
        self.num_computed_tokens = 0
        self._requests = (_sequence(number, length) for number, length in enumerate(lengths))
        self._concurrency = concurrency or len(lengths)
        self._num_open = 0

    def moments(self) -> Iterator[Moment]:
        in_flight = None
        while True:
            for seq in itertools.islice(self._requests, self._concurrency - self._num_open):
                self.scheduler.add(seq)
                self._num_open += 1
            output = self.scheduler.schedule()
            self.num_computed_tokens += output.num_tokens
            if in_flight is not None:
                self._finish(in_flight)
            if not self._num_open:
                return
            in_flight = output
            yield self._moment()

    def run(self) -> Usage:
        return Usage(tuple(self.moments()), self.scheduler.num_preemptions, self.num_computed_tokens)

    def _finish(self, output: SchedulerOutput) -> None:
        for item in output.scheduled:
            for seq in item.sampled:
                seq.num_pending -= 1
                seq.token_ids.append(0)
                if len(seq.token_ids) >= seq.max_total_tokens:
                    self.scheduler.finish(seq)
                    self._num_open -= 1

    def _moment(self) -> Moment:
        running, blocks = self.scheduler.running, self.scheduler.blocks
        return Moment(
            num_running=len(running),
            num_waiting=len(self.scheduler.waiting),
            allocated=blocks.num_used * blocks.block_size,
            computed=sum(seq.num_computed for seq in running),
        )


def paged(num_blocks: int, *, max_num_seqs: int = MAX_NUM_SEQS) -> Scheduler:
    """Blocks of ``BLOCK_SIZE`` tokens, without prefix caching: nothing is shared."""
    return Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, prefix_caching=False),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )


def static(num_places: int) -> Scheduler:
    """``num_places`` sequences that reserve ``MAX_MODEL_LEN`` tokens each. Blocks are never what they wait for."""
    return Scheduler(
        BlockManager(2 * num_places, MAX_MODEL_LEN, prefix_caching=False),
        max_num_seqs=num_places,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )


def smallest_pool(lengths: ListOf[ChatLength], concurrency: int) -> int:
    """Blocks of the smallest pool with which ``concurrency`` requests at a time neither preempt nor hold up anybody."""
    most = concurrency * MAX_MODEL_LEN // BLOCK_SIZE
    # The reserve that admissions leave for growth comes on top.
    plenty = Simulation(paged(2 * most, max_num_seqs=concurrency), lengths, concurrency)
    expected = [moment.num_running for moment in plenty.moments()]

    def suffices(num_blocks: int) -> bool:
        simulation = Simulation(paged(num_blocks, max_num_seqs=concurrency), lengths, concurrency)
        return all(
            moment.num_running == num_running and not simulation.scheduler.num_preemptions
            for moment, num_running in zip(simulation.moments(), expected, strict=False)
        )

    longest = max(-(-(length.prompt + length.output) // BLOCK_SIZE) for length in lengths)
    return bisect.bisect_left(range(2 * most), True, lo=longest, key=suffices)


def _sequence(number: int, length: ChatLength) -> Sequence:
    return Sequence(
        request_id=str(number),
        sample_index=0,
        token_ids=[0] * length.prompt,
        num_prompt_tokens=length.prompt,
        params=SamplingParams(seed=0, max_tokens=length.output),
        max_total_tokens=length.prompt + length.output,
        stop_ids=frozenset(),
        arrival=number,
    )
