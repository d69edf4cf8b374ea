"""CudaGraphs: the decoder's work for a batch of decodes, captured once for each batch bucket and replayed.

A step is padded to the next bucket: rows beyond it have context 0 and store nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then multiples of 8 to 64, of 16 to 256 and of 64 beyond, up to ``max_num_seqs``."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 64, 64)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


@dataclass(frozen=True)
class CapturedStep:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    """[bucket, vocab] float32: written by every replay."""


class CudaGraphs:
    """``forward(bucket)`` must launch a whole step for that bucket and return its logits."""

    def __init__(self, buckets: tuple[int, ...], forward: Callable[[int], Tensor]) -> None:
        self.buckets = buckets
        self._forward = forward
        self._captured: dict[int, CapturedStep] = {}

    def capture(self, progress: Callable[[str], None]) -> int:
        """Capture all buckets, largest first, so that the smaller ones reuse its memory; returns the bytes taken."""
        before = torch.cuda.memory_reserved()
        pool = torch.cuda.graph_pool_handle()
        for index, bucket in enumerate(reversed(self.buckets)):
            progress(f"capturing CUDA graphs: {index * 100 // len(self.buckets)}%")
            # Kernels are compiled and workspaces of libraries allocated before the capture, which forbids both.
            self._forward(bucket)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._forward(bucket)
            self._captured[bucket] = CapturedStep(graph, logits)
        return torch.cuda.memory_reserved() - before

    def bucket_for(self, num_seqs: int) -> int | None:
        """The smallest bucket that holds so many sequences; None when there is none."""
        index = bisect.bisect_left(self.buckets, num_seqs)
        return self.buckets[index] if index < len(self.buckets) else None

    def replay(self, bucket: int) -> Tensor:
        """Run a captured step; returns its logits [bucket, vocab], valid until the next replay."""
        captured = self._captured[bucket]
        captured.graph.replay()
        return captured.logits
