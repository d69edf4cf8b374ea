"""Four times more requests than a real Triton server can take: how long accepted ones take beside those at capacity,
and how quickly the others are refused; results to load_tests/results/overload.jsonl.

    python load_tests/bench_overload.py

Capacity is what as many clients get as the engine runs requests at a time, each asking again at once, so that none
waits. Requests then arrive at random, at a multiple of that rate, and ``max_queue_wait`` says how long those that are
accepted may wait. ``--queue-wait 0`` has a queue of a fixed number instead, and as many more clients at capacity, so
that they wait, too. Both phases alternate, and each overload is compared with the capacity before it. What clients,
server, doors, engine and other programs use of the cores stands beside the times.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from results_file import RESULTS, ResultsFile
from served_model import ROOT, ServedModel, end_through_contexts, environment_of_checkout

from trident_client import AsyncTridentClient, Overloaded, RetryPolicy, TridentError

TINY = ROOT / "load_tests/models/tiny-llama"
MAX_NUM_SEQS, MAX_QUEUE_SIZE = 16, 16
SETTINGS = {
    "load_format": "dummy", "dtype": "fp32", "device": "cpu", "num_threads": "1", "max_model_len": "1024",
    "max_num_blocks": "1024", "max_num_seqs": str(MAX_NUM_SEQS), "max_queue_size": str(MAX_QUEUE_SIZE),
}  # fmt: skip
SHARES = (0.5, 0.95)


@dataclass
class Seen:
    """What clients saw in one phase, in seconds, and what was used meanwhile."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """From the first request's start to the last one's end."""
    cores: dict[str, float] = field(default_factory=dict)
    """Busy cores on average, by what used them; ``others``: programs that have nothing to do with this one."""

    def latency_ms(self, share: float) -> float:
        return quantile(self.accepted, share)


async def ask(client: AsyncTridentClient, rng: random.Random, num_tokens: int, seen: Seen) -> None:
    """Answers have ``num_tokens`` on average, each between half of it and one and a half times as many."""
    num_tokens = round(num_tokens * rng.uniform(0.5, 1.5))
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


async def at_capacity(
    client: AsyncTridentClient, num_clients: int, seconds: float, num_tokens: int, seen: Seen
) -> None:
    """``num_clients`` clients, each asking again as soon as it has its answer."""
    end = time.monotonic() + seconds

    async def ask_again(rng: random.Random) -> None:
        while time.monotonic() < end:
            await ask(client, rng, num_tokens, seen)

    await asyncio.gather(*(ask_again(random.Random(number)) for number in range(num_clients)))


async def overloaded(client: AsyncTridentClient, seconds: float, num_tokens: int, rate: float, seen: Seen) -> None:
    """Requests at random moments, ``rate`` a second, whatever becomes of them."""
    rng, now = random.Random(0), time.monotonic()
    end, due, sent = now + seconds, now, []
    while (due := due + rng.expovariate(rate)) < end:
        # By the clock and not one pause after another, so that a busy machine is not offered less.
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        sent.append(asyncio.create_task(ask(client, random.Random(rng.random()), num_tokens, seen)))
    await asyncio.gather(*sent)


async def phase(server: ServedModel, load: Callable[[Seen], Coroutine[Any, Any, None]]) -> Seen:
    seen, began, before = Seen(), time.monotonic(), cpu_seconds(server)
    await load(seen)
    seen.seconds = time.monotonic() - began
    seen.cores = {name: (spent - before[name]) / seen.seconds for name, spent in cpu_seconds(server).items()}
    return seen


def cpu_seconds(server: ServedModel) -> dict[str, float]:
    """CPU time so far, by what used it."""
    machine = psutil.cpu_times()
    ours = {"clients": time.process_time(), **asdict(server.cpu_seconds())}
    return {**ours, "others": sum(machine) - machine.idle - machine.iowait - sum(ours.values())}


async def measure(server: ServedModel, args: argparse.Namespace) -> list[tuple[Seen, Seen]]:
    """Each round's phases: at capacity, and overloaded."""
    num_clients = MAX_NUM_SEQS if args.queue_wait else MAX_NUM_SEQS + MAX_QUEUE_SIZE
    async with AsyncTridentClient(server.address, retry=RetryPolicy(retries=0)) as client:
        rounds = []
        # The first one, which is shorter, shows the engine how quickly requests end.
        for seconds in (args.seconds / 3, *[args.seconds] * args.rounds):
            capacity = await phase(server, partial(at_capacity, client, num_clients, seconds, args.tokens))
            rate = args.times * len(capacity.accepted) / capacity.seconds
            overload = await phase(server, partial(overloaded, client, seconds, args.tokens, rate))
            rounds.append((capacity, overload))
        return rounds[1:]


def quantile(values: Sequence[float], share: float) -> float:
    """Milliseconds; the nearest rank."""
    ordered = sorted(values)
    return 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    settings = {**SETTINGS, "max_queue_wait": f"{args.queue_wait:g}"}
    launch = ["--model", str(TINY), "--doors=2", *(f"--set={key}={value}" for key, value in settings.items())]
    environment = environment_of_checkout()
    with tempfile.TemporaryDirectory() as folder, ServedModel(launch, environment, Path(folder)) as server:
        server.wait(args.start_timeout)
        rounds = asyncio.run(measure(server, args))
    errors = [error for phases in rounds for seen in phases for error in seen.errors]
    if errors or not all(overload.refused for _, overload in rounds):
        refused = [len(overload.refused) for _, overload in rounds]
        print(f"bench_overload: {len(errors)} errors, {errors[:3]}; {refused} refused", file=sys.stderr)
        return 1
    record(args, rounds)
    return 0


def record(args: argparse.Namespace, rounds: Sequence[tuple[Seen, Seen]]) -> None:
    """Every value is the median of the rounds."""
    bound = f"wait {args.queue_wait:g} s" if args.queue_wait else f"queue of {MAX_QUEUE_SIZE}"
    results = ResultsFile(
        path=args.out,
        benchmark="bench_overload",
        model="tiny-llama",
        variant=f"{args.times:g}x, {bound}",
        settings={**SETTINGS, "max_queue_wait": args.queue_wait, "tokens": args.tokens, "seconds": args.seconds},
    )
    overloads = [overload for _, overload in rounds]
    for name, phases in (("capacity", [capacity for capacity, _ in rounds]), ("overload", overloads)):
        results.record(name, "accepted", [len(seen.accepted) for seen in phases])
        for share in SHARES:
            results.record(name, f"latency_p{100 * share:.0f}_ms", [seen.latency_ms(share) for seen in phases])
        for user in phases[0].cores:
            results.record(name, f"{user}_cores", [seen.cores[user] for seen in phases])
    results.record("overload", "refused", [len(seen.refused) for seen in overloads])
    for share in (0.5, 0.99):
        results.record(
            "overload", f"refusal_p{100 * share:.0f}_ms", [quantile(seen.refused, share) for seen in overloads]
        )
    for share in SHARES:
        ratios = [overload.latency_ms(share) / capacity.latency_ms(share) for capacity, overload in rounds]
        results.record("overload", f"latency_p{100 * share:.0f}_ratio", ratios)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=4.0, help="of the rate at capacity (default: 4)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each phase (default: 15)")
    parser.add_argument("--rounds", type=int, default=3, help="both phases alternate so often (default: 3)")
    parser.add_argument("--tokens", type=int, default=512, help="output tokens of a request on average (default: 512)")
    parser.add_argument("--queue-wait", type=float, default=0.25, metavar="SECONDS",
                        help="the setting max_queue_wait; 0: max_queue_size alone (default: 0.25)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "overload.jsonl")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
