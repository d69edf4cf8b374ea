"""Four times more requests than a real Triton server can take: how long accepted ones take beside those at capacity,
and how quickly the others are refused; results to load_tests/results/overload.jsonl.

    python load_tests/bench_overload.py

Capacity is what as many clients get as the engine runs and queues requests, each asking again at once. Requests then
arrive at random, at a multiple of that rate.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from results_file import RESULTS, ResultsFile
from served_model import ROOT, ServedModel, end_through_contexts, environment_of_checkout

from trident_client import AsyncTridentClient, Overloaded, RetryPolicy, TridentError

TINY = ROOT / "load_tests/models/tiny-llama"
MAX_NUM_SEQS, MAX_QUEUE_SIZE = 16, 16
SETTINGS = {
    "load_format": "dummy", "dtype": "fp32", "device": "cpu", "num_threads": "1", "max_model_len": "1024",
    "max_num_blocks": "1024", "max_num_seqs": str(MAX_NUM_SEQS), "max_queue_size": str(MAX_QUEUE_SIZE),
}  # fmt: skip


@dataclass
class Seen:
    """What clients saw, in seconds."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


async def ask(client: AsyncTridentClient, rng: random.Random, num_tokens: int, seen: Seen) -> None:
    prompt = "".join(rng.choices("abcdefgh ", k=64))
    began = time.monotonic()
    try:
        await client.generate(prompt, stream=False, max_tokens=num_tokens, ignore_eos=True, timeout=120)
    except Overloaded as error:
        if error.retry_after is None:
            seen.errors.append(str(error))
        seen.refused.append(time.monotonic() - began)
    except TridentError as error:
        seen.errors.append(str(error))
    else:
        seen.accepted.append(time.monotonic() - began)


async def at_capacity(client: AsyncTridentClient, seconds: float, num_tokens: int) -> Seen:
    """As many clients as there are places, each asking again as soon as it has its answer."""
    seen, end = Seen(), time.monotonic() + seconds

    async def ask_again(rng: random.Random) -> None:
        while time.monotonic() < end:
            await ask(client, rng, num_tokens, seen)

    await asyncio.gather(*(ask_again(random.Random(number)) for number in range(MAX_NUM_SEQS + MAX_QUEUE_SIZE)))
    return seen


async def overloaded(client: AsyncTridentClient, seconds: float, num_tokens: int, rate: float) -> Seen:
    """Requests at random moments, ``rate`` a second, whatever becomes of them."""
    seen, rng, end = Seen(), random.Random(0), time.monotonic() + seconds
    sent = []
    while time.monotonic() < end:
        await asyncio.sleep(rng.expovariate(rate))
        sent.append(asyncio.create_task(ask(client, random.Random(rng.random()), num_tokens, seen)))
    await asyncio.gather(*sent)
    return seen


async def measure(address: str, args: argparse.Namespace) -> tuple[Seen, Seen]:
    async with AsyncTridentClient(address, retry=RetryPolicy(retries=0)) as client:
        await at_capacity(client, args.seconds / 4, args.tokens)
        capacity = await at_capacity(client, args.seconds, args.tokens)
        rate = args.times * len(capacity.accepted) / args.seconds
        return capacity, await overloaded(client, args.seconds, args.tokens, rate)


def quantile(values: Sequence[float], share: float) -> float:
    """Milliseconds; the nearest rank."""
    ordered = sorted(values)
    return 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    launch = ["--model", str(TINY), "--doors=2", *(f"--set={key}={value}" for key, value in SETTINGS.items())]
    environment = environment_of_checkout()
    with tempfile.TemporaryDirectory() as folder, ServedModel(launch, environment, Path(folder)) as server:
        server.wait(args.start_timeout)
        capacity, overload = asyncio.run(measure(server.address, args))
    errors = [*capacity.errors, *overload.errors]
    if errors or not overload.refused:
        print(f"bench_overload: {len(errors)} errors, {errors[:3]}; {len(overload.refused)} refused", file=sys.stderr)
        return 1
    results = ResultsFile(
        path=args.out,
        benchmark="bench_overload",
        model="tiny-llama",
        variant=f"{args.times:g}x",
        settings={**SETTINGS, "tokens": args.tokens, "seconds": args.seconds},
    )
    for name, seen in (("capacity", capacity), ("overload", overload)):
        results.record(name, "accepted", [len(seen.accepted)])
        for share in (0.5, 0.95):
            results.record(name, f"latency_p{100 * share:.0f}_ms", [quantile(seen.accepted, share)])
    results.record("overload", "refused", [len(overload.refused)])
    for share in (0.5, 0.99):
        results.record("overload", f"refusal_p{100 * share:.0f}_ms", [quantile(overload.refused, share)])
    ratio = quantile(overload.accepted, 0.5) / quantile(capacity.accepted, 0.5)
    results.record("overload", "latency_p50_ratio", [ratio])
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=4.0, help="of the rate at capacity (default: 4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase (default: 30)")
    parser.add_argument("--tokens", type=int, default=512, help="output tokens of each request (default: 512)")
    parser.add_argument("--out", type=Path, default=RESULTS / "overload.jsonl")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
