"""The OpenAI gateway beside direct gRPC on one server: first token of one client, tokens/s of many streams; results to
load_tests/results/gateway.jsonl.

    python load_tests/bench_gateway.py --model load_tests/models/tiny-llama --name tiny-llama --set load_format=dummy

Starts a server and a gateway, measures both ways in turn with clients in this process, and ends both. The direct way is
AsyncTridentClient, which the gateway uses, too; the HTTP client reads server-sent events without parsing their JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from client_pool import BenchFailed
from engine_arguments import engine_parser, engine_settings
from results_file import ResultsFile
from served_model import ServedModel, end_through_contexts, environment_of_checkout

from trident_client import AsyncTridentClient, TridentError

GATEWAY_SECONDS = 30.0
_USAGE = b'"completion_tokens": '


@dataclass(frozen=True)
class Times:
    """One stream: seconds to its first token, and its output tokens."""

    first_token: float
    output_tokens: int


Ask = Callable[[str, int], Awaitable[Times]]
"""Streams the answer to a prompt, of so many tokens."""


def main() -> int:
    parser = engine_parser(__doc__, "gateway.jsonl")
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each stream (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    end_through_contexts()
    try:
        measure(args)
    except (BenchFailed, TridentError, OSError) as error:
        print(f"bench_gateway: {error}", file=sys.stderr)
        return 1
    return 0


def measure(args: argparse.Namespace) -> None:
    settings = engine_settings(args)
    environment = environment_of_checkout()
    launch = ["--model", args.model, *(f"--set={key}={value}" for key, value in settings.items())]
    with tempfile.TemporaryDirectory() as folder, ServedModel(launch, environment, Path(folder)) as server:
        server.wait(300.0)
        with gateway(server.address, environment) as port:
            measured = asyncio.run(run_all(args, server.address, port))
    for way, metrics in measured.items():
        results = ResultsFile(
            path=args.out, benchmark="bench_gateway", model=args.name, variant=args.variant,
            settings={**settings, "way": way, "streams": args.streams, "tokens": args.tokens},
        )  # fmt: skip
        for (workload, metric), runs in metrics.items():
            results.record(f"{way}_{workload}", metric, runs)


@contextlib.contextmanager
def gateway(address: str, environment: Mapping[str, str]) -> Iterator[int]:
    """A gateway in a process of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trident_client.cli", "openai", "--port", str(port), "--url", address]
    process = subprocess.Popen(command, env=dict(environment))
    try:
        deadline = time.monotonic() + GATEWAY_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed("the gateway did not start")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(GATEWAY_SECONDS)


async def run_all(args: argparse.Namespace, address: str, port: int) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Both ways in turn, after one warm-up of each: way -> (workload, metric) -> one value per run."""
    async with AsyncTridentClient(address) as client:
        ways: dict[str, Ask] = {"direct": direct(client), "gateway": through(port)}
        measured: dict[str, dict[tuple[str, str], list[float]]] = {way: {} for way in ways}
        for run in range(args.runs + 1):
            for way, ask in ways.items():
                waits = [(await ask(f"{run} {number}", 8)).first_token for number in range(10)]
                speed = await tokens_per_second(ask, args.streams, args.tokens, str(run))
                if run == 0:
                    continue
                measured[way].setdefault(("one_client", "first_token_ms"), []).append(1e3 * statistics.median(waits))
                measured[way].setdefault((f"streams_{args.streams}", "tokens_per_s"), []).append(speed)
    return measured


async def tokens_per_second(ask: Ask, streams: int, tokens: int, salt: str) -> float:
    began = time.monotonic()
    answers = await asyncio.gather(*(ask(f"{salt} stream {number}", tokens) for number in range(streams)))
    seconds = time.monotonic() - began
    if any(answer.output_tokens != tokens for answer in answers):
        raise BenchFailed(f"a stream did not have {tokens} tokens")
    return streams * tokens / seconds


def direct(client: AsyncTridentClient) -> Ask:
    async def ask(prompt: str, tokens: int) -> Times:
        began, first, count = time.monotonic(), 0.0, 0
        async for chunk in client.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True):
            if chunk.num_output_tokens and not count:
                first = time.monotonic() - began
            count += chunk.num_output_tokens or 0
        return Times(first, count)

    return ask


def through(port: int) -> Ask:
    async def ask(prompt: str, tokens: int) -> Times:
        wanted = {"model": "llm", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                  "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        body = json.dumps(wanted).encode()
        began, first, count = time.monotonic(), 0.0, 0
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = "POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                if not first:
                    first = time.monotonic() - began
                if (found := line.find(_USAGE)) >= 0:
                    count = int(line[found + len(_USAGE) :].split(b",")[0])
        finally:
            writer.close()
        return Times(first, count)

    return ask


if __name__ == "__main__":
    sys.exit(main())
