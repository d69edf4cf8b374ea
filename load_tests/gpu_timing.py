"""Times GPU work inside a CUDA graph, and measures the two ceilings that kernels are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

RUNS = 9


def graph_times(launches: Sequence[Callable[[], object]], runs: int = RUNS) -> list[float]:
    """Milliseconds per launch, from replays of one graph that holds all of them one after another.

    Give each launch its own operands, together several times the L2 cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(launches))
    return times


def graph_ms(launches: Sequence[Callable[[], object]], runs: int = RUNS) -> float:
    """Median of ``graph_times``."""
    return statistics.median(graph_times(launches, runs))


@triton.jit
def _read_kernel(values, out, n, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int32)
    for first in range(tl.program_id(0) * TILE, n, tl.num_programs(0) * TILE):
        total += tl.load(values + first + offsets, eviction_policy="evict_first")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth() -> float:
    """GB/s that the best of a few plain reading kernels reaches over 4 GiB."""
    values = torch.randint(-9, 9, (1 << 30,), dtype=torch.int32, device="cuda")
    best = 0.0
    for tile, programs, warps in ((4096, 264, 8), (4096, 528, 8), (8192, 528, 8), (8192, 264, 16), (4096, 1056, 8)):
        out = torch.empty(programs, dtype=torch.int32, device="cuda")
        launch = lambda out=out, tile=tile, programs=programs, warps=warps: _read_kernel[(programs,)](  # noqa: E731
            values, out, values.numel(), TILE=tile, num_warps=warps
        )
        best = max(best, values.numel() * 4 / graph_ms([launch], 5) / 1e6)
    return best


def matmul_rate() -> float:
    """TFLOP/s of a bf16 matrix product of size 8192 through torch."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / graph_ms([lambda: torch.mm(a, b, out=out)] * 3, 5) / 1e9
