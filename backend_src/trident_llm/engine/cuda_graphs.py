"""CudaGraphs: the decoder's work for steps of some shapes, captured once and replayed.

A step is padded to the smallest shape that holds it: tokens beyond it have no slot, sequences no context. Which of a
mixed step's sequences decode is read on the device, so a shape fixes only how many there can be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_MAX_PREFILLS = 64
"""Sequences of a mixed step with several tokens; one more turns up as a program that ends at once per KV head."""

_MIXED_DECODES = (32, 256)
"""Decodes of mixed steps, besides the most there can be. The contexts of few are split over several programs, and each
sequence there is room for is a row of the last layer and of the head."""

_MAX_SPLIT_TOKENS = 256
"""Larger steps have tiles of query rows enough to keep a GPU busy without splitting the contexts of prompts."""
_MAX_SPLIT_PREFILLS = 8
"""Each sequence there is room for is a program per KV head and split, even where there is none; and more sequences
bring more tiles."""


@dataclass(frozen=True, order=True)
class StepShape:
    """Room for ``num_tokens`` tokens of ``num_decodes`` sequences with one and ``num_prefills`` with several."""

    num_tokens: int
    num_decodes: int
    num_prefills: int
    num_seqs: int
    """Sequences, rows of logits and samples."""
    long_contexts: bool = False
    """See AttentionMetadata. Any step may run with it; short contexts are only slower."""
    adapters: bool = False
    """Whether tokens may take adapters. Any step may run with it; it is only slower."""
    mixed: bool = False
    """Whether the weights of adapters differ by module, because a mix finds them; with ``adapters`` only."""


_WIDE_SIZES = (256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
"""Rows that cuBLAS multiplies well. What lies between costs as much or more: all linear layers of Mistral-7B on an H100
take 8.4 ms for 384 rows, 14.0 for 448 and 9.7 for 512; 19.7 for 832 and 18.6 for 1,024."""


def _up_to(limit: int, sizes: Iterable[int]) -> tuple[int, ...]:
    return (*(size for size in sizes if size < limit), limit)


def _wide_sizes(limit: int) -> tuple[int, ...]:
    return (*_WIDE_SIZES, *range(_WIDE_SIZES[-1] + 512, limit, 512))


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, multiples of 8 to 64 and of 16 to 256, and the sizes that suit matrix products beyond."""
    return _up_to(max_num_seqs, [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *_wide_sizes(max_num_seqs)])


def mixed_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Multiples of 32 to 128 and of 64 to 256, and the sizes that suit matrix products beyond."""
    small = [16, *range(32, 128, 32), *range(128, 256, 64)]
    return _up_to(max_num_batched_tokens, [*small, *_wide_sizes(max_num_batched_tokens)])


def graph_shapes(
    max_num_seqs: int, max_num_batched_tokens: int, *, adapters: bool = False, mixes: bool = False
) -> tuple[StepShape, ...]:
    """Steps of decodes alone, of prompts alone, and of both; small ones with prompts also for long contexts.

    With ``adapters`` each of them also for steps whose tokens take some, and with ``mixes`` some of a mix.
    """
    shapes = [StepShape(size, size, 0, size) for size in decode_sizes(min(max_num_seqs, max_num_batched_tokens))]
    for size in mixed_sizes(max_num_batched_tokens):
        num_prefills = min(_MAX_PREFILLS, size, max_num_seqs)
        shapes.append(StepShape(size, 0, num_prefills, num_prefills))
        for num_decodes in sorted({min(count, max_num_seqs, size) for count in (*_MIXED_DECODES, max_num_seqs)}):
            num_seqs = min(num_decodes + num_prefills, max_num_seqs)
            shapes.append(StepShape(size, num_decodes, num_prefills, num_seqs))
        if size <= _MAX_SPLIT_TOKENS:
            num_prefills = min(_MAX_SPLIT_PREFILLS, num_prefills)
            for num_decodes in (0, min(size, max_num_seqs)):
                num_seqs = min(num_decodes + num_prefills, max_num_seqs)
                shapes.append(StepShape(size, num_decodes, num_prefills, num_seqs, long_contexts=True))
    plain = tuple(shapes)
    if adapters:
        shapes += [dataclasses.replace(shape, adapters=True) for shape in plain]
    if mixes:
        shapes += [dataclasses.replace(shape, adapters=True, mixed=True) for shape in plain]
    return tuple(shapes)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing an earlier engine's graphs and events during a capture, which breaks it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _search_order(shape: StepShape) -> tuple[int, bool, StepShape]:
    """Fewest tokens first; of equally many, shapes for long contexts first."""
    return shape.num_tokens, not shape.long_contexts, shape


class CudaGraphs:
    """``forward(shape)`` must launch a whole step of that shape on whatever the step's buffers hold."""

    def __init__(self, shapes: Sequence[StepShape], forward: Callable[[StepShape], None]) -> None:
        ordered = sorted(shapes, key=_search_order)
        self._decodes = [shape for shape in ordered if not shape.num_prefills]
        self._prefills = [shape for shape in ordered if not shape.num_decodes]
        self._mixed = [shape for shape in ordered if shape.num_decodes and shape.num_prefills]
        self._forward = forward
        self._captured: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self.num_bytes = 0
        """That the captured graphs take."""

    def capture(self, progress: Callable[[str], None]) -> Iterator[None]:
        """Capture all shapes, one between two values of the iterator.

        Largest first, so that the smaller ones reuse its memory.
        """
        gc.collect()
        before = torch.cuda.memory_reserved()
        pool = torch.cuda.graph_pool_handle()
        shapes = sorted((*self._decodes, *self._prefills, *self._mixed), reverse=True)
        for index, shape in enumerate(shapes):
            progress(f"capturing CUDA graphs: {index * 100 // len(shapes)}%")
            self._captured[shape] = self._capture_shape(shape, pool)
            yield
        self.num_bytes = torch.cuda.memory_reserved() - before

    def release(self) -> None:
        """Drop the graphs and their memory."""
        self._captured.clear()
        self.num_bytes = 0

    @torch.inference_mode()
    def _capture_shape(self, shape: StepShape, pool: Any) -> torch.cuda.CUDAGraph:
        with _no_collection():
            # Kernels are compiled and workspaces of libraries allocated before the capture, which forbids both.
            self._forward(shape)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._forward(shape)
            return graph

    def find_shape(self, step: StepShape) -> StepShape | None:
        """The smallest captured shape that holds a step of shape ``step``; None when there is none."""
        return self.find(
            num_tokens=step.num_tokens,
            num_decodes=step.num_decodes,
            num_prefills=step.num_prefills,
            num_samples=step.num_seqs,
            long_contexts=step.long_contexts,
            adapters=step.adapters,
            mixed=step.mixed,
        )

    def find(
        self,
        *,
        num_tokens: int,
        num_decodes: int,
        num_prefills: int,
        num_samples: int,
        long_contexts: bool,
        adapters: bool = False,
        mixed: bool = False,
    ) -> StepShape | None:
        """The smallest shape that holds such a step; None when there is none.

        num_samples: rows of logits or samples, whichever are more. long_contexts: prefer a shape for them among those
        of the same size.
        """
        shapes = self._mixed if num_decodes and num_prefills else self._decodes if num_decodes else self._prefills
        for shape in shapes:
            if (shape.adapters, shape.mixed) != (adapters, mixed) or (shape.long_contexts and not long_contexts):
                continue
            fits = shape.num_tokens >= num_tokens and shape.num_decodes >= num_decodes
            if fits and shape.num_prefills >= num_prefills and shape.num_seqs >= num_samples:
                return shape
        return None

    @property
    def largest_prefill(self) -> StepShape:
        return self._prefills[-1]

    def replay(self, shape: StepShape) -> None:
        self._captured[shape].replay()
