"""Speed through a real Triton server: the standard workloads, results to load_tests/results/server.jsonl.

    python load_tests/bench_server.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy

Starts a server, measures it with gRPC streaming clients in processes of their own, and ends it. A request that fails
fails the benchmark. The last thing printed is a table, beside the engine's own numbers from bench_engine.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_pool import BenchFailed, ClientPool
from engine_arguments import add_settings, engine_settings, names_of, positive
from results_file import RESULTS, ResultsFile, device_name
from served_model import ServedModel, end_through_contexts, environment_of_checkout
from server_workloads import SERVER_WORKLOADS, ServerBench

from trident_client import TridentError

Measured = dict[tuple[str, str], float]
"""Medians by workload and metric."""


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    results = ResultsFile(
        path=args.out,
        benchmark="bench_server",
        model=args.name,
        variant=args.variant,
        settings={**args.set, "doors": args.doors, "clients": args.clients},
    )
    try:
        measured = measure(args, results)
    except BenchFailed as error:
        print(f"bench_server: {error}", file=sys.stderr)
        return 1
    print_table(measured, engine_results(args.engine_results, args.name, args.variant, device_name()))
    return 0


def measure(args: argparse.Namespace, results: ResultsFile) -> Measured:
    """Start the server, record every workload, end the server. Raises ``BenchFailed``."""
    environment = environment_of_checkout()
    settings = [f"--set={key}={value}" for key, value in args.set.items()]
    launch = ["--model", args.model, f"--doors={args.doors}", *settings]
    with tempfile.TemporaryDirectory() as folder, ServedModel(launch, environment, Path(folder)) as server:
        server.wait(args.start_timeout)
        measured = {("start", "s"): results.record("start", "s", [server.start_seconds])}
        try:
            with ClientPool(server.address, args.clients, environment) as clients:
                bench = ServerBench(server, clients)
                for workload in args.workloads:
                    measured |= record(bench, workload, args.runs, results)
        except (BenchFailed, TridentError) as error:
            raise BenchFailed(f"{error}{server.tail()}") from None
    return measured


def record(bench: ServerBench, workload: str, num_runs: int, results: ResultsFile) -> Measured:
    """One warm-up and ``num_runs`` runs of a workload."""
    print(f"{workload}: warm-up and {num_runs} runs", flush=True)
    SERVER_WORKLOADS[workload](bench)
    bench.check_stats()
    runs = []
    for _ in range(num_runs):
        runs.append(SERVER_WORKLOADS[workload](bench))
        preemptions = bench.check_stats()
        if preemptions:
            print(f"  {preemptions} preemptions", flush=True)
    return {(workload, metric): results.record(workload, metric, [run[metric] for run in runs]) for metric in runs[0]}


def engine_results(path: Path, model: str, variant: str, device: str) -> Measured:
    """The latest values of bench_engine.py for the same model, variant and device; empty without such a file."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    wanted = {"benchmark": "bench_engine", "model": model, "variant": variant, "device": device}
    return {
        (line["workload"], line["metric"]): line["value"]
        for line in lines
        if all(line[key] == value for key, value in wanted.items())
    }


def print_table(measured: Measured, engine: Mapping[tuple[str, str], float]) -> None:
    print(f"\n{'workload':<18} {'metric':<20} {'server':>10} {'engine':>10} {'server/engine':>14}")
    for (workload, metric), value in measured.items():
        own = engine.get((workload, metric))
        beside = "" if own is None else f" {own:>10.2f} {value / own:>13.1%}"
        print(f"{workload:<18} {metric:<20} {value:>10.2f}{beside}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="the model's name in the results")
    parser.add_argument("--variant", default="bf16")
    add_settings(parser)
    parser.add_argument("--workloads", default=list(SERVER_WORKLOADS), type=names_of(SERVER_WORKLOADS),
                        metavar="NAME,...", help=f"of {', '.join(SERVER_WORKLOADS)}")  # fmt: skip
    parser.add_argument("--runs", type=positive, default=3)
    parser.add_argument("--doors", type=positive, default=8, help="instances of the model llm (default: 8)")
    parser.add_argument("--clients", type=positive, default=default_clients(),
                        help="client processes (default: half the cores, at most 8)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "server.jsonl")
    parser.add_argument("--engine-results", type=Path, default=RESULTS / "engine.jsonl",
                        help="of bench_engine.py, to compare with")  # fmt: skip
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    args = parser.parse_args()
    args.set = {"prefix_caching": "false", **engine_settings(args)}
    return args


def default_clients() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


if __name__ == "__main__":
    sys.exit(main())
