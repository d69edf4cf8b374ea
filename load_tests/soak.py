"""Random load on a real Triton server for half an hour, and what it left behind: memory, threads, sockets, errors.

    python load_tests/soak.py --minutes 30

The same requests go to a second server with an echo model, because the Triton server's own memory grows, too. Both are
warmed up with bursts and a higher rate, so that the minutes that count do not bring more at once than those before.
Each minute the load pauses, and both servers are looked at when nothing runs. Ends with code 1 when a check fails;
results go to load_tests/results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from client_pool import BenchFailed
from engine_arguments import add_settings, engine_settings
from random_adapters import write_random_adapters
from results_file import RESULTS, ResultsFile
from served_model import ROOT, ServedModel, end_through_contexts, environment_of_checkout
from soak_load import Load
from soak_sample import RSS, Check, Sample, count_checks, growth, memory_checks, table, take_sample

from trident_client import TridentError

TINY = ROOT / "load_tests/models/tiny-llama"
ECHO = ROOT / "load_tests/repositories/echo"
SETTINGS = {
    "device": "cpu",
    "num_threads": "1",
    "max_model_len": "2048",
    "max_num_blocks": "512",
    "max_num_seqs": "64",
    "max_queue_size": "256",
}
"""A pool that the load fills and evicts from within the first minutes."""
NUM_ADAPTERS = 4
"""One more than there are slots for, so that slots change hands."""
QUIET_SECONDS = 20.0
"""How long a server may take to free everything after its last request has ended."""
WARM_UP_SHARE = 0.7
"""Rounds that begin within this share of the warm-up have more requests: one before its end has as many as later."""
SETTLE_SECONDS = 2.0
"""From the last request's end to a sample: connections that clients closed are gone by then."""


@dataclass
class Pool:
    """What the engine's statistics said of the KV cache."""

    limit: int
    """Blocks, as configured."""
    peak: int = 0
    """Most blocks that sequences held."""
    violations: list[str] = field(default_factory=list)
    num_looks: int = 0
    restarts: int = 0

    def look(self, stats: Mapping[str, Any]) -> None:
        self.num_looks += 1
        self.restarts = stats["engine_restarts"]
        used, cached = stats["kv_blocks_used"], stats["kv_blocks_cached"]
        self.peak = max(self.peak, used)
        if stats["kv_blocks_total"] != self.limit or used + cached > self.limit:
            self.violations.append(f"{used} blocks used and {cached} cached of {stats['kv_blocks_total']}")

    def look_when_quiet(self, stats: Mapping[str, Any]) -> None:
        """All blocks must have come back."""
        self.look(stats)
        held = {name: stats[name] for name in ("kv_blocks_used", "running_requests", "waiting_requests") if stats[name]}
        if held:
            self.violations.append(f"{held} {QUIET_SECONDS:.0f} s after the last request")


class Soak:
    """One server under load, with all that is measured of it."""

    def __init__(self, server: ServedModel, load: Load, pool: Pool | None) -> None:
        self.server = server
        self.load = load
        self.pool = pool
        self.samples: list[Sample] = []
        self._began = time.monotonic()

    async def round(self, seconds: float, *, warm_up: bool) -> None:
        """Load for ``seconds``, then a sample when nothing runs."""
        ended = asyncio.Event()
        watch = asyncio.create_task(self._watch_pool(ended))
        try:
            await self.load.run(seconds, warm_up=warm_up)
        finally:
            # Not cancelled: servers before 25.01 can break when a call that is just beginning is.
            ended.set()
            await watch
        await self._wait_until_quiet()
        self.samples.append(take_sample(self.server, (time.monotonic() - self._began) / 60))

    async def _watch_pool(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            stats = await self.load.client.stats()
            if self.pool is not None:
                self.pool.look(stats)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), 1.0)

    async def _wait_until_quiet(self) -> None:
        """Until the engine holds nothing, and clients' closed connections are gone."""
        deadline = time.monotonic() + QUIET_SECONDS
        await asyncio.sleep(SETTLE_SECONDS)
        stats = await self.load.client.stats()
        while self.pool is not None:
            if time.monotonic() > deadline or not (stats["kv_blocks_used"] or stats["waiting_requests"]):
                self.pool.look_when_quiet(stats)
                return
            await asyncio.sleep(0.2)
            stats = await self.load.client.stats()


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    try:
        trident, echo = asyncio.run(soak(args))
    except BenchFailed as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    return report(args, trident, echo)


async def soak(args: argparse.Namespace) -> tuple[Soak, Soak]:
    """Both servers under the same load, one after the other's start and at the same time then."""
    environment = environment_of_checkout()
    environment["GOMP_SPINCOUNT"] = environment.get("GOMP_SPINCOUNT", "1000")
    settings = [f"--set={key}={value}" for key, value in args.set.items()]
    echo = ["--model", str(TINY), "--model-repository", str(ECHO)]
    with ExitStack() as servers:
        adapters = Path(servers.enter_context(tempfile.TemporaryDirectory()))
        paths = write_random_adapters(adapters, args.model, count=NUM_ADAPTERS, rank=8)
        names = [path.name for path in paths]
        loaded = ",".join(f"{path.name}={path}" for path in paths)
        settings += [f"--set=adapter_root={adapters}", f"--set=adapters={loaded}"]
        settings += [f"--set=max_loras={NUM_ADAPTERS - 1}"]
        model = ["--model", args.model, f"--doors={args.doors}", *settings]
        started = []
        for arguments in (model, echo):
            folder = Path(servers.enter_context(tempfile.TemporaryDirectory()))
            started.append(servers.enter_context(ServedModel(arguments, environment, folder)))
        for server in started:
            server.wait(args.start_timeout)
        async with AsyncExitStack() as loads:
            soaks = [
                Soak(server, await loads.enter_async_context(_load(args, server, names, is_echo)), pool)
                for server, is_echo, pool in zip(
                    started, (False, True), (Pool(limit=int(args.set["max_num_blocks"])), None), strict=True
                )
            ]
            try:
                await _rounds(args, soaks)
            except (TridentError, psutil.Error) as error:
                raise BenchFailed(f"{error}{''.join(server.tail() for server in started)}") from None
    return soaks[0], soaks[1]


async def _rounds(args: argparse.Namespace, soaks: list[Soak]) -> None:
    began = time.monotonic()
    while (left := began + 60 * args.minutes - time.monotonic()) > 0:
        warm_up = time.monotonic() - began < 60 * args.warmup * WARM_UP_SHARE
        await asyncio.gather(*(one.round(min(left, args.interval), warm_up=warm_up) for one in soaks))
        print(f"{soaks[0].samples[-1].minutes:6.1f} min: {sum(soaks[0].load.kinds.values())} requests, "
              f"{soaks[0].load.errors.total()} errors; "
              + ", ".join(f"{name} {getattr(soaks[0].samples[-1], name):.1f}" for name in RSS)
              + f" MiB; echo server {soaks[1].samples[-1].server:.1f} MiB", flush=True)  # fmt: skip


def _load(args: argparse.Namespace, server: ServedModel, adapters: Sequence[str], is_echo: bool) -> Load:
    return Load(
        grpc=server.address,
        http=server.http_address,
        is_echo=is_echo,
        rate=args.rate,
        max_model_len=int(args.set["max_model_len"]),
        seed=args.seed,
        grpc_cancels=args.grpc_cancels,
        adapters=tuple(adapters),
    )


def report(args: argparse.Namespace, trident: Soak, echo: Soak) -> int:
    """Print and record everything; the exit code."""
    assert trident.pool is not None
    pool, errors = trident.pool, trident.load.errors
    checks = [
        Check(name="errors", value=errors.total(), limit=0),
        Check(name="engine_restarts", value=pool.restarts, limit=0),
        Check(name="pool_violations", value=len(pool.violations), limit=0),
        Check(name="kv_blocks_peak", value=pool.peak, limit=pool.limit),
        *memory_checks(trident.samples, echo.samples, args.warmup),
        *count_checks(trident.samples, args.warmup),
    ]
    for name, one in (("trident", trident), ("echo", echo)):
        print(f"\n{name}: {sum(one.load.kinds.values())} requests: {dict(one.load.kinds)}\n{table(one.samples)}")
        for text, count in one.load.errors.most_common():
            print(f"  {count} times {text}")
    for text in pool.violations:
        print(f"  pool: {text}")
    print()
    record(args, trident, echo, checks)
    print(f"\n{'check':<24} {'value':>10} {'limit':>10}")
    for check in checks:
        print(f"{check.name:<24} {check.value:>10.4g} {check.limit:>10.4g} {'' if check.passed else '  FAILED'}")
    return 0 if all(check.passed for check in checks) else 1


def record(args: argparse.Namespace, trident: Soak, echo: Soak, checks: list[Check]) -> None:
    settings = {
        **args.set, "doors": args.doors, "minutes": args.minutes, "warmup": args.warmup, "rate": args.rate,
        "seed": args.seed, "grpc_cancels": args.grpc_cancels,
    }  # fmt: skip
    files = {
        name: ResultsFile(path=args.out, benchmark="soak", model=args.name, variant=name, settings=settings)
        for name in ("trident", "echo")
    }
    workload = f"soak_{args.minutes:g}_min"
    for name, one in (("trident", trident), ("echo", echo)):
        files[name].record(workload, "requests", [sum(one.load.kinds.values())])
        for kind in RSS if one is trident else RSS[:1]:
            files[name].record(workload, f"{kind}_rss_mib", [getattr(sample, kind) for sample in one.samples])
    files["echo"].record(workload, "server_growth", [growth(echo.samples, args.warmup, "server")])
    for check in checks:
        files["trident"].record(workload, check.name, [check.value])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warmup", type=float, default=5.0, help="minutes after which nothing may grow (default: 5)")
    parser.add_argument("--interval", type=float, default=55.0, help="seconds of load between two looks (default: 55)")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second to each server (default: 6)")
    parser.add_argument("--model", default=str(TINY), help="default: a tiny random one")
    parser.add_argument("--name", default="tiny-llama", help="the model's name in the results")
    add_settings(parser)
    parser.add_argument("--doors", type=int, default=2, help="instances of the model llm (default: 2)")
    parser.add_argument("--grpc-cancels", action="store_true",
                        help="cancel gRPC calls, too; the server must be 25.03 or later to survive that")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.jsonl")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    args = parser.parse_args()
    dummy = {"load_format": "dummy", "dtype": "fp32"} if args.model == str(TINY) else {}
    args.set = {**dummy, **SETTINGS, **engine_settings(args)}
    if not args.warmup < args.minutes:
        parser.error(f"--warmup {args.warmup:g} is not less than --minutes {args.minutes:g}")
    return args


if __name__ == "__main__":
    sys.exit(main())
