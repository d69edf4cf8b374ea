"""CudaGraphs: the decoder's work for steps of some shapes, captured once and replayed.

A step is padded to the smallest shape that holds it: tokens beyond it have no slot, sequences no context. Which of a
mixed step's sequences decode is read on the device, so a shape fixes only how many there can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_MAX_PREFILLS = 64
"""Sequences of a mixed step with several tokens; one more turns up as a program that ends at once per KV head."""

_FEW_DECODES = 32
"""With so few decodes their contexts are split over several programs, which costs time when there are many."""


@dataclass(frozen=True, order=True)
class StepShape:
    """Room for ``num_tokens`` tokens of ``num_decodes`` sequences with one and ``num_prefills`` with several."""

    num_tokens: int
    num_decodes: int
    num_prefills: int
    num_seqs: int
    """Sequences, rows of logits and samples."""


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then multiples of 8 to 64, of 16 to 256 and of 64 beyond, up to ``max_num_seqs``."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 64, 64)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def mixed_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Multiples of 32 to 128, of 64 to 256 and of 128 beyond, up to ``max_num_batched_tokens``: with more rows than
    256 matrix products take the same time up to the next multiple of their 128 or 256 rows."""
    sizes = [16, *range(32, 128, 32), *range(128, 256, 64), *range(256, max_num_batched_tokens + 128, 128)]
    return (*(size for size in sizes if size < max_num_batched_tokens), max_num_batched_tokens)


def graph_shapes(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[StepShape, ...]:
    """Steps of decodes alone, of prompts alone, and of both."""
    shapes = [StepShape(size, size, 0, size) for size in decode_sizes(min(max_num_seqs, max_num_batched_tokens))]
    for size in mixed_sizes(max_num_batched_tokens):
        num_prefills = min(_MAX_PREFILLS, size, max_num_seqs)
        shapes.append(StepShape(size, 0, num_prefills, num_prefills))
        for num_decodes in sorted({min(count, max_num_seqs, size) for count in (_FEW_DECODES, max_num_seqs)}):
            num_seqs = min(num_decodes + num_prefills, max_num_seqs)
            shapes.append(StepShape(size, num_decodes, num_prefills, num_seqs))
    return tuple(shapes)


class CudaGraphs:
    """``forward(shape)`` must launch a whole step of that shape on whatever the step's buffers hold."""

    def __init__(self, shapes: Sequence[StepShape], forward: Callable[[StepShape], None]) -> None:
        self._decodes = sorted(shape for shape in shapes if not shape.num_prefills)
        self._prefills = sorted(shape for shape in shapes if not shape.num_decodes)
        self._mixed = sorted(shape for shape in shapes if shape.num_decodes and shape.num_prefills)
        self._forward = forward
        self._captured: dict[StepShape, torch.cuda.CUDAGraph] = {}

    def capture(self, progress: Callable[[str], None]) -> int:
        """Capture all shapes, largest first, so that the smaller ones reuse its memory; returns the bytes taken."""
        before = torch.cuda.memory_reserved()
        pool = torch.cuda.graph_pool_handle()
        shapes = sorted((*self._decodes, *self._prefills, *self._mixed), reverse=True)
        for index, shape in enumerate(shapes):
            progress(f"capturing CUDA graphs: {index * 100 // len(shapes)}%")
            # Kernels are compiled and workspaces of libraries allocated before the capture, which forbids both.
            self._forward(shape)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._forward(shape)
            self._captured[shape] = graph
        return torch.cuda.memory_reserved() - before

    def find(self, *, num_tokens: int, num_decodes: int, num_prefills: int, num_samples: int) -> StepShape | None:
        """The smallest shape that holds such a step; None when there is none.

        num_samples: rows of logits or samples, whichever are more.
        """
        shapes = self._mixed if num_decodes and num_prefills else self._decodes if num_decodes else self._prefills
        for shape in shapes:
            fits = shape.num_tokens >= num_tokens and shape.num_decodes >= num_decodes
            if fits and shape.num_prefills >= num_prefills and shape.num_seqs >= num_samples:
                return shape
        return None

    def replay(self, shape: StepShape) -> None:
        self._captured[shape].replay()
