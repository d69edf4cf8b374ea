"""What becomes of a long stream when its model is unloaded, or loaded anew, with a real Triton server and no model;
results to load_tests/results/unload.jsonl.

``python -m load_tests.bench_unload --doors 1 2 4`` also prints what the server's index says meanwhile, and measures
what asking for it costs: a door whose requests run asks twice a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import tritonclient.grpc as grpcclient

from load_tests.results_file import ResultsFile
from tests.live.live_server import LiveServer, serve_fake
from tests.live.requests import GrpcStream, num_doors
from trident_llm.server.engine_watch import wait_for_end
from trident_llm.server.server_index import Address, ServerIndex

RESULTS = Path(__file__).parent / "results/unload.jsonl"
MODEL = "llm"
DRAIN_TIMEOUT = 1
NUM_ASKS = 500
INTERVAL = 0.02
"""Seconds between two looks of this program at the index."""

Runs = dict[tuple[str, str], list[float]]
"""Values by workload and metric."""


def state(server: LiveServer) -> str:
    return ServerIndex(Address("127.0.0.1", server.ports.http)).state_of(MODEL, "1")


def seconds_until_end(server: LiveServer, stream: GrpcStream, act: Callable[[], None]) -> float:
    """From the end of ``act`` to that of a stream that has begun; prints what the index says meanwhile."""
    stream.submit("hello", stream=True, max_tokens=4000)
    stream.next()
    act()
    began, seen = time.monotonic(), ""
    while True:
        if (now := state(server)) != seen:
            seen = now
            print(f"    {time.monotonic() - began:5.2f} s  {seen}", flush=True)
        with contextlib.suppress(queue.Empty):
            answer = stream.next(timeout=INTERVAL)
            if answer.is_final:
                print(f"    {time.monotonic() - began:5.2f} s  the stream ends: {answer.error or 'whole'}", flush=True)
                return time.monotonic() - began


def seconds_until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        time.sleep(INTERVAL)
    return time.monotonic() - began


def run_round(server: LiveServer, triton: grpcclient.InferenceServerClient, doors: int, runs: Runs) -> None:
    print(f"  {doors} doors: the model is unloaded", flush=True)
    with GrpcStream(server, MODEL) as stream:
        seconds = seconds_until_end(server, stream, lambda: triton.unload_model(MODEL))
    runs[f"unload_doors_{doors}", "cut_s"].append(seconds)
    record_end(server, f"unload_doors_{doors}", "after_cut", runs)
    triton.load_model(MODEL)
    print(f"  {doors} doors: the model is loaded with another config", flush=True)
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{MODEL}/config") as response:
        config = json.load(response)
    config["max_batch_size"] += 1
    with GrpcStream(server, MODEL) as stream:
        load = {"config": json.dumps(config)}
        seconds = seconds_until_end(server, stream, lambda: triton.load_model(MODEL, **load))
    runs[f"reload_doors_{doors}", "cut_s"].append(seconds)
    seconds = seconds_until(lambda: num_doors(server, MODEL) == doors)
    runs[f"reload_doors_{doors}", "unloaded_after_cut_s"].append(seconds)
    print(f"  {doors} doors: the idle model is unloaded", flush=True)
    triton.unload_model(MODEL)
    record_end(server, f"idle_doors_{doors}", "after_unload", runs)
    triton.load_model(MODEL)


def record_end(server: LiveServer, workload: str, after: str, runs: Runs) -> None:
    """Wait for the ends of the engine and of the last door."""
    began = time.monotonic()
    assert wait_for_end(server.find_process("fake_engine").pid, 60.0)
    runs[workload, f"engine_ended_{after}_s"].append(time.monotonic() - began)
    seconds_until(lambda: state(server) == "UNAVAILABLE")
    runs[workload, f"unloaded_{after}_s"].append(time.monotonic() - began)


def measure_asking(server: LiveServer, runs: Runs) -> None:
    index = ServerIndex(Address("127.0.0.1", server.ports.http))
    process = server.find_process("bin/tritonserver")
    before, began, spent = process.cpu_times(), time.monotonic(), time.process_time()
    for _ in range(NUM_ASKS):
        assert index.state_of(MODEL, "1") == "READY"
    spent, seconds, after = time.process_time() - spent, time.monotonic() - began, process.cpu_times()
    server_seconds = after.user + after.system - before.user - before.system
    for metric, total in (("door_cpu_ms", spent), ("server_cpu_ms", server_seconds), ("ms", seconds)):
        runs["one_question", metric].append(1000 * total / NUM_ASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--doors", type=int, nargs="+", default=[1, 2, 4], help="instances of llm")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs: Runs = defaultdict(list)
    for doors in arguments.doors:
        settings = ("--doors", str(doors), "--set", "max_queue_size=0", "--set", f"drain_timeout={DRAIN_TIMEOUT}")
        with (
            tempfile.TemporaryDirectory() as folder,
            serve_fake(Path(folder), *settings, "--set", "max_num_seqs=256", "--only", MODEL) as server,
            server.grpc_client() as triton,
        ):
            for _ in range(arguments.runs):
                run_round(server, triton, doors, runs)
                measure_asking(server, runs)
    results = ResultsFile(
        path=arguments.out,
        benchmark="bench_unload",
        model="a step of 10 ms",
        variant=MODEL,
        settings={"drain_timeout": DRAIN_TIMEOUT},
    )
    for (workload, metric), values in runs.items():
        results.record(workload, metric, values)


if __name__ == "__main__":
    main()
