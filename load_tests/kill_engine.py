"""Kills the engine process again and again, at random moments while streams run, and compares every text with the
same request's undisturbed answer; results to load_tests/results/kill_engine.jsonl.

    python load_tests/kill_engine.py --kills 200

Ends with code 1 when a request failed or a text was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client_pool import BenchFailed
from engine_arguments import add_settings, engine_settings
from results_file import RESULTS, ResultsFile
from served_model import ROOT, ServedModel, end_through_contexts, environment_of_checkout

from trident_client import AsyncTridentClient, RetryPolicy, TridentError

TINY = ROOT / "load_tests/models/tiny-llama"
SETTINGS = {"device": "cpu", "num_threads": "1", "max_model_len": "2048", "max_num_blocks": "2048"}
READY_SECONDS = 120.0
"""How long a restart may take."""
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Question:
    """A request whose answer is the same every time: greedy, or sampled with a seed."""

    prompt: str
    options: dict[str, Any]

    @classmethod
    def random(cls, number: int, num_tokens: int) -> Question:
        rng = random.Random(number)
        options = {"temperature": 0} if number % 2 else {"temperature": 0.8, "top_p": 0.9, "seed": number}
        prompt = " ".join(rng.choices(_WORDS, k=rng.randint(5, 60)))
        return cls(prompt, {**options, "max_tokens": num_tokens, "ignore_eos": True})


@dataclass
class Outcome:
    """What the streams and the kills have come to."""

    num_requests: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    restart_seconds: list[float] = field(default_factory=list)
    """From each kill until the engine was ready again."""

    def summary(self) -> str:
        return f"{self.num_requests} requests, {self.failed.total()} failed, {self.wrong.total()} wrong"


class KillRun:
    """One server whose engine is killed ``num_kills`` times under one stream for each question."""

    def __init__(self, server: ServedModel, client: AsyncTridentClient, questions: list[Question]) -> None:
        self.outcome = Outcome()
        self._server = server
        self._client = client
        self._questions = questions
        self._answers: list[str] = []

    async def run(self, num_kills: int, *, spread: float, seed: int) -> Outcome:
        """Learn the answers, then ask all questions again and again until the last kill is over."""
        self._answers = [await self._ask(question) for question in self._questions]
        ended = asyncio.Event()
        await self._stream_all(ended, num_rounds=1)
        if self.outcome.failed or self.outcome.wrong:
            raise BenchFailed(f"answers differ without any kill: {self.outcome.failed + self.outcome.wrong}")
        streams = asyncio.create_task(self._stream_all(ended))
        rng = random.Random(seed)
        for number in range(num_kills):
            await asyncio.sleep(rng.uniform(0, spread))
            seconds = await self._kill()
            self.outcome.restart_seconds.append(seconds)
            print(f"kill {number + 1}: ready after {seconds:.1f} s, {self.outcome.summary()}", flush=True)
        ended.set()
        await streams
        return self.outcome

    async def _stream_all(self, ended: asyncio.Event, num_rounds: int | None = None) -> None:
        await asyncio.gather(*(self._stream(number, ended, num_rounds) for number in range(len(self._questions))))

    async def _stream(self, number: int, ended: asyncio.Event, num_rounds: int | None) -> None:
        while num_rounds != 0 and not ended.is_set():
            num_rounds = None if num_rounds is None else num_rounds - 1
            self.outcome.num_requests += 1
            try:
                text = await self._ask(self._questions[number])
            except TridentError as error:
                self.outcome.failed[str(error)] += 1
                continue
            if text != self._answers[number]:
                same = next(i for i, (a, b) in enumerate(zip(text, self._answers[number], strict=False)) if a != b)
                self.outcome.wrong[f"question {number} from character {same} of {len(text)}"] += 1

    async def _ask(self, question: Question) -> str:
        chunks = self._client.generate(question.prompt, **question.options)
        return "".join([chunk.text async for chunk in chunks])

    async def _kill(self) -> float:
        """Kill the engine; seconds until another one is ready."""
        (engine,) = self._server.processes()["engine"]
        began = time.monotonic()
        engine.send_signal(signal.SIGKILL)
        while time.monotonic() - began < READY_SECONDS:
            await asyncio.sleep(0.05)
            present = self._server.processes()["engine"]
            if present and present[0].pid != engine.pid and (await self._client.health())["ready"]:
                return time.monotonic() - began
        raise BenchFailed(f"no engine was ready {READY_SECONDS:.0f} s after a kill{self._server.tail()}")


async def measure(args: argparse.Namespace) -> tuple[Outcome, dict[str, Any]]:
    settings = [f"--set={key}={value}" for key, value in args.set.items()]
    launch = ["--model", args.model, "--doors=2", "--set=max_num_seqs=64", "--set=max_queue_size=64", *settings]
    questions = [Question.random(number, args.tokens) for number in range(args.streams)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(ServedModel(launch, environment_of_checkout(), folder))
        server.wait(args.start_timeout)
        async with AsyncTridentClient(server.address, retry=RetryPolicy(retries=0)) as client:
            outcome = await KillRun(server, client, questions).run(args.kills, spread=args.spread, seed=args.seed)
            stats = await client.stats()
    return outcome, stats


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    try:
        outcome, stats = asyncio.run(measure(args))
    except BenchFailed as error:
        print(f"kill_engine: {error}", file=sys.stderr)
        return 1
    results = ResultsFile(
        path=args.out,
        benchmark="kill_engine",
        model=args.name,
        variant="trident",
        settings={**args.set, "streams": args.streams, "tokens": args.tokens, "spread": args.spread, "seed": args.seed},
    )
    workload = f"kills_{args.kills}"
    for metric, value in (
        ("requests", outcome.num_requests),
        ("failed", outcome.failed.total()),
        ("wrong_texts", outcome.wrong.total()),
        ("engine_restarts", stats["engine_restarts"]),
        ("restart_median_s", statistics.median(outcome.restart_seconds)),
        ("restart_longest_s", max(outcome.restart_seconds)),
    ):
        results.record(workload, metric, [value])
    for text, count in (outcome.failed + outcome.wrong).most_common():
        print(f"  {count} times {text}")
    return 1 if outcome.failed or outcome.wrong or stats["engine_restarts"] != args.kills else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="output tokens of each request (default: 400)")
    parser.add_argument("--spread", type=float, default=2.0, metavar="SECONDS",
                        help="a kill comes 0 to this long after the engine is ready (default: 2)")  # fmt: skip
    parser.add_argument("--model", default=str(TINY), help="default: a tiny random one")
    parser.add_argument("--name", default="tiny-llama", help="the model's name in the results")
    add_settings(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_engine.jsonl")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    args = parser.parse_args()
    # In float32 a text does not depend on what else is in the batch.
    dummy = {"load_format": "dummy"} if args.model == str(TINY) else {}
    args.set = {"dtype": "fp32", **dummy, **SETTINGS, **engine_settings(args)}
    return args


if __name__ == "__main__":
    sys.exit(main())
