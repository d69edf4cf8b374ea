"""What a token costs one process of the OpenAI gateway: tokens for each second of its CPU time, and its memory; results
to load_tests/results/gateway_core.jsonl.

    python load_tests/bench_gateway_core.py --other ../before

Before a scripted server, so that neither engine nor doors take part: its tokens come as fast as the gateway takes them,
and as an engine's steps bring them. --other measures the gateway of another checkout in the same turns, and then the
last thing printed is how many times as many tokens this one's CPU time is good for.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench_server import default_clients
from client_pool import HTTP_CLIENT, BenchFailed, ClientPool
from engine_arguments import positive
from results_file import RESULTS, ResultsFile
from served_gateway import ServedGateway, other_environment
from served_model import end_through_contexts, environment_of_checkout

SERVER = Path(__file__).parent / "scripted_server.py"
SECONDS = {"at_once": 0.0, "every_20_ms": 0.02}
"""From one token of a stream to the next, by workload."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=positive, default=64)
    parser.add_argument("--tokens", type=positive, default=200, help="of each stream (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=7)
    parser.add_argument("--clients", type=positive, default=default_clients())
    parser.add_argument("--other", type=Path, metavar="CHECKOUT", help="started without --workers")
    parser.add_argument("--out", type=Path, default=RESULTS / "gateway_core.jsonl")
    args = parser.parse_args()
    end_through_contexts()
    try:
        ratios = {workload: measure(args, workload, seconds) for workload, seconds in SECONDS.items()}
    except (BenchFailed, OSError) as error:
        print(f"bench_gateway_core: {error}", file=sys.stderr)
        return 1
    for workload, runs in ratios.items():
        if runs:
            shown = ", ".join(f"{ratio:.2f}" for ratio in runs)
            print(f"{workload}: {statistics.median(runs):.2f} times the other's tokens for its CPU time (runs {shown})")
    return 0


def measure(args: argparse.Namespace, workload: str, seconds: float) -> list[float]:
    """Record one workload; the ratios to the other checkout, one per run. Raises ``BenchFailed``."""
    environment = environment_of_checkout()
    measured: dict[str, dict[str, list[float]]] = {}
    with scripted_server(seconds, environment) as address, contextlib.ExitStack() as stack:
        gateways = {"gateway": ServedGateway(address, environment, ["--workers", "1"])}
        if args.other is not None:
            gateways["other"] = ServedGateway(address, other_environment(args.other, environment))
        clients = {}
        for way, gateway in gateways.items():
            stack.enter_context(gateway)
            clients[way] = stack.enter_context(ClientPool(gateway.address, args.clients, environment, HTTP_CLIENT))
        for run in range(args.runs + 1):
            for way, gateway in gateways.items():
                before = sum(gateway.cpu_seconds().values())
                found = clients[way].run([f"{run} {number}" for number in range(args.streams)],
                                         [args.tokens] * args.streams)  # fmt: skip
                used = sum(gateway.cpu_seconds().values()) - before
                if not used:
                    raise BenchFailed("--streams, --tokens: too few to take any CPU time; give more")
                if run:
                    metrics = measured.setdefault(way, {"tokens_per_cpu_s": [], "tokens_per_s": [], "memory_mb": []})
                    metrics["tokens_per_cpu_s"].append(found.output_tokens / used)
                    metrics["tokens_per_s"].append(found.output_tokens / found.seconds)
                    metrics["memory_mb"].append(sum(each.memory_info().rss for each in gateway.processes()) / 2**20)
    settings = {"streams": args.streams, "tokens": args.tokens, "clients": args.clients}
    for way, metrics in measured.items():
        results = ResultsFile(
            path=args.out, benchmark="bench_gateway_core", model="scripted", variant=way, settings=settings
        )
        for metric, runs in metrics.items():
            results.record(workload, metric, runs)
    if "other" not in measured:
        return []
    rates = [measured[way]["tokens_per_cpu_s"] for way in ("gateway", "other")]
    return [ours / theirs for ours, theirs in zip(*rates, strict=True)]


@contextlib.contextmanager
def scripted_server(seconds: float, environment: Mapping[str, str]) -> Iterator[str]:
    """Its address, as host:port."""
    command = [sys.executable, str(SERVER), str(seconds)]
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise BenchFailed(f"the scripted server could not start: exit code {process.wait()}")
            yield address
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
