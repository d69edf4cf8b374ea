"""The OpenAI gateway beside direct gRPC on one server: first token of one client, tokens/s of many streams; results to
load_tests/results/gateway.jsonl.

    python load_tests/bench_gateway.py --model load_tests/models/tiny-llama --name tiny-llama --set load_format=dummy

Starts a server and a gateway, measures both ways in turn with client processes that only note what comes when, and ends
both. The first token is the first with text, because the gateway sends none without. --other measures the gateway of
another checkout, too, in the same turns. The last thing printed is a table.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench_server import default_clients
from client_pool import GRPC_CLIENT, HTTP_CLIENT, BenchFailed, ClientPool
from engine_arguments import engine_parser, engine_settings, positive
from results_file import ResultsFile
from served_gateway import ServedGateway, other_environment
from served_model import ServedModel, end_through_contexts, environment_of_checkout

from trident_client import TridentError
from trident_gateway.cores import default_workers

FIRST_TOKENS = 10
"""Requests of one client in each run, one after another."""
FIRST_TOKEN_LENGTH = 8
Measured = dict[tuple[str, str], list[float]]
"""One value per run, by workload and metric."""


@dataclass
class Way:
    """How clients reach the server; without a ``gateway`` directly."""

    clients: ClientPool
    gateway: ServedGateway | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    measured: Measured = field(default_factory=dict)

    def run(self, run: int, streams: int, tokens: int) -> dict[tuple[str, str], float]:
        """First tokens of one client, then all streams at once."""
        lone = [self.clients.run([f"{run} {number}"], [FIRST_TOKEN_LENGTH]) for number in range(FIRST_TOKENS)]
        before = self.gateway.cpu_seconds() if self.gateway else {}
        together = self.clients.run([f"{run} stream {number}" for number in range(streams)], [tokens] * streams)
        after = self.gateway.cpu_seconds() if self.gateway else {}
        workload = f"streams_{streams}"
        found = {
            ("one_client", "first_token_ms"): statistics.median(one.first_text_ms() for one in lone),
            (workload, "tokens_per_s"): together.output_tokens / together.seconds,
            (workload, "client_cpu_share"): together.client_cpu_share,
        }
        if self.gateway:
            used = [seconds - before.get(process, 0.0) for process, seconds in after.items()]
            found[workload, "cpu_us_per_token"] = 1e6 * sum(used) / together.output_tokens
            found[workload, "busiest_worker_cores"] = max(used) / together.seconds
        return found


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    try:
        measure(args)
    except (BenchFailed, TridentError, OSError) as error:
        print(f"bench_gateway: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = engine_parser(__doc__, "gateway.jsonl")
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--streams", type=positive, default=64)
    parser.add_argument("--tokens", type=positive, default=512,
                        help="output tokens of each stream (default: %(default)s)")  # fmt: skip
    parser.add_argument("--runs", type=positive, default=3)
    parser.add_argument("--workers", type=positive, default=default_workers(),
                        help="of the gateway (default: the gateway's own, here %(default)s)")  # fmt: skip
    parser.add_argument("--clients", type=positive, default=default_clients(),
                        help="client processes of each way (default: half the cores, at most 8)")  # fmt: skip
    parser.add_argument("--other", type=Path, metavar="CHECKOUT",
                        help="also measure the gateway of this checkout, started without --workers")  # fmt: skip
    parser.add_argument("--start-timeout", type=float, default=150.0, metavar="SECONDS", help="of the server")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """Raises ``BenchFailed``."""
    settings = {"prefix_caching": "false", **engine_settings(args)}
    environment = environment_of_checkout()
    others = {} if args.other is None else {"other": other_environment(args.other, environment)}
    launch = ["--model", args.model, *(f"--set={key}={value}" for key, value in settings.items())]
    with (
        tempfile.TemporaryDirectory() as folder,
        ServedModel(launch, environment, Path(folder)) as server,
        contextlib.ExitStack() as stack,
    ):
        server.wait(args.start_timeout)
        ways = start_ways(args, server.address, environment, others, stack)
        try:
            run_all(ways, args)
        except BenchFailed as error:
            raise BenchFailed(f"{error}{server.tail()}") from None
    for name, way in ways.items():
        results = ResultsFile(
            path=args.out, benchmark="bench_gateway", model=args.name, variant=args.variant,
            settings={**settings, "way": name, "streams": args.streams, "tokens": args.tokens,
                      "clients": args.clients, **way.settings},
        )  # fmt: skip
        for (workload, metric), runs in way.measured.items():
            results.record(f"{name}_{workload}", metric, runs)
    print_table(ways, f"streams_{args.streams}")


def start_ways(
    args: argparse.Namespace,
    address: str,
    environment: dict[str, str],
    others: Mapping[str, dict[str, str]],
    stack: contextlib.ExitStack,
) -> dict[str, Way]:
    """``others``: environments of further gateways, by the names of their ways."""

    def clients(address: str, program: Path) -> ClientPool:
        return stack.enter_context(ClientPool(address, args.clients, environment, program))

    def through(gateway: ServedGateway, **settings: int) -> Way:
        stack.enter_context(gateway)
        return Way(clients(gateway.address, HTTP_CLIENT), gateway, settings)

    own = ServedGateway(address, environment, ["--workers", str(args.workers)])
    ways = {"direct": Way(clients(address, GRPC_CLIENT)), "gateway": through(own, workers=args.workers)}
    return ways | {name: through(ServedGateway(address, other)) for name, other in others.items()}


def run_all(ways: Mapping[str, Way], args: argparse.Namespace) -> None:
    """All ways in turn, after one warm-up of each; each run's tokens/s also as a share of the direct way's."""
    speed = (f"streams_{args.streams}", "tokens_per_s")
    for run in range(args.runs + 1):
        found = {name: way.run(run, args.streams, args.tokens) for name, way in ways.items()}
        if run == 0:
            continue
        for name, way in ways.items():
            if way.gateway:
                found[name][speed[0], "share_of_direct"] = found[name][speed] / found["direct"][speed]
            for key, value in found[name].items():
                way.measured.setdefault(key, []).append(value)


def print_table(ways: Mapping[str, Way], workload: str) -> None:
    columns = {
        "first token, ms": ("one_client", "first_token_ms"),
        "tokens/s": (workload, "tokens_per_s"),
        "share of direct": (workload, "share_of_direct"),
        "CPU us/token": (workload, "cpu_us_per_token"),
        "busiest worker, cores": (workload, "busiest_worker_cores"),
        "busiest client, cores": (workload, "client_cpu_share"),
    }
    print("\nway      workers  " + "  ".join(columns))
    for name, way in ways.items():
        cells = [f"{name:<8} {way.settings.get('workers', ''):>7}"]
        for title, key in columns.items():
            runs = way.measured.get(key)
            value = statistics.median(runs) if runs else None
            cells.append(f"{'' if value is None else f'{value:,.2f}':>{len(title)}}")
        print("  ".join(cells))


if __name__ == "__main__":
    sys.exit(main())
