"""How connections spread over worker processes: one listening socket that all share, or one for each as the gateway has
them; results to load_tests/results/accept.jsonl.

    python load_tests/bench_accept.py

Workers run uvloop and do nothing but accept. Reports the share of the busiest one, of connections that come at once and
of some that come one after another, as long-lived connections of a few clients do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import multiprocessing
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop
from engine_arguments import positive
from results_file import RESULTS, ResultsFile

from trident_gateway.listen import listen

GAPS = {"at_once": 0.0, "one_by_one": 0.005}
"""Seconds between connections."""
START_SECONDS = 20.0
ACCEPT_SECONDS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=positive, default=4)
    parser.add_argument("--connections", type=positive, default=64)
    parser.add_argument("--runs", type=positive, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "accept.jsonl")
    args = parser.parse_args()
    for kind in ("shared", "own"):
        results = ResultsFile(
            path=args.out, benchmark="bench_accept", model="none", variant=kind,
            settings={"workers": args.workers, "connections": args.connections},
        )  # fmt: skip
        with accepting(kind, args.workers) as (address, counts):
            for name, gap in GAPS.items():
                shares = [busiest_share(address, counts, args.connections, gap) for _ in range(args.runs)]
                results.record(name, "busiest_share", shares)
    return 0


@contextlib.contextmanager
def accepting(kind: str, num_workers: int) -> Iterator[tuple[Any, Any]]:
    """Worker processes: where they listen, and how many connections each has accepted."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    if kind == "own":
        sockets = [own[0] for own in listen("127.0.0.1", port, num_workers)]
    else:
        sockets = listen("127.0.0.1", port, 1)[0] * num_workers
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray(ctypes.c_long, num_workers)
    started = context.RawArray(ctypes.c_bool, num_workers)
    workers = [
        context.Process(target=accept, args=(number, sockets[number], counts, started), daemon=True)
        for number in range(num_workers)
    ]
    try:
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + START_SECONDS
        while not all(started):
            if time.monotonic() > deadline:
                raise TimeoutError(f"workers did not start within {START_SECONDS:.0f} s")
            time.sleep(0.05)
        yield sockets[0].getsockname(), counts
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        for listener in sockets:
            listener.close()


def accept(number: int, listener: socket.socket, counts: Any, started: Any) -> None:
    """A worker, which runs until it is killed."""

    class Counted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            counts[number] += 1

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Counted, sock=listener, backlog=2048)
        started[number] = True
        await server.serve_forever()

    uvloop.run(serve())


def busiest_share(address: Any, counts: Sequence[int], num_connections: int, gap: float) -> float:
    before = list(counts)
    with contextlib.ExitStack() as stack:
        for _ in range(num_connections):
            stack.enter_context(socket.create_connection(address))
            time.sleep(gap)
        deadline = time.monotonic() + ACCEPT_SECONDS
        while sum(counts) - sum(before) < num_connections:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all connections were accepted within {ACCEPT_SECONDS:.0f} s")
            time.sleep(0.01)
    return max(now - then for now, then in zip(counts, before, strict=True)) / num_connections


if __name__ == "__main__":
    sys.exit(main())
