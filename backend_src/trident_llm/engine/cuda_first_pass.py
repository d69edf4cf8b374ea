"""CudaFirstPass: on a GPU, the pass over sequences with a mix that yields the classifier's input. See mix_pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.lora_layer import LoraRows
from ..models.llama import LlamaDecoder
from .batch import StepAdapters
from .cuda_graphs import CudaGraphs, StepShape
from .device_input import device_input, seq_counts, shape_of, step_values
from .flat_step import FlatStep
from .kv_cache import KVCache
from .step_buffers import StepBuffers, StepSizes


class CudaFirstPass:
    """Has buffers of its own, because the second pass is uploaded before the first has run.

    ``sampled``: the device's tokens of the step before. ``shapes``: those to capture; other steps run without graphs.
    """

    def __init__(
        self,
        decoder: LlamaDecoder,
        kv_cache: KVCache,
        *,
        sampled: Tensor,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        table_width: int,
        shapes: tuple[StepShape, ...],
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._sampled = sampled
        device = decoder.device
        largest = StepSizes(max_num_batched_tokens, max_num_seqs, 0, 0)
        self._buffers = StepBuffers(largest, table_width=table_width, device=device)
        self._rows = torch.arange(max_num_batched_tokens, device=device)
        shape = (max_num_batched_tokens, decoder.config.hidden_size)
        self._hidden = torch.zeros(shape, dtype=decoder.dtype, device=device)
        self._graphs = CudaGraphs(shapes, self._captured)

    @property
    def graph_bytes(self) -> int:
        return self._graphs.num_bytes

    def capture(self, progress: Callable[[str], None]) -> Iterator[None]:
        """Capture the graphs, one between two values. No step may be in flight."""
        self._buffers.clear()
        return self._graphs.capture(progress)

    def release_graphs(self) -> None:
        self._graphs.release()

    def run(self, step: FlatStep, rows: LoraRows | None) -> Tensor:
        """The last hidden states of the step's tokens, [T, H]; overwritten by the next step. rows: what they take."""
        own = shape_of(step, num_samples=0, adapters=False)
        shape = None if rows is not None else self._graphs.find_shape(own)
        sizes = _sizes(shape or own)
        counts = seq_counts(step, sizes.num_seqs, padded=shape is not None)
        values = {**step_values(step, counts), "logits_rows": []}
        self._buffers.upload(sizes, values, step.block_tables)
        if shape is None:
            self._forward(own, self._buffers.block_tables[: own.num_seqs, : step.table_width], rows)
        else:
            self._graphs.replay(shape)
        return self._hidden[: len(step.token_ids)]

    def _captured(self, shape: StepShape) -> None:
        self._forward(shape, self._buffers.block_tables[: shape.num_seqs], None)

    def _forward(self, shape: StepShape, tables: Tensor, rows: LoraRows | None) -> None:
        wanted = self._rows[: shape.num_tokens]
        model_input = device_input(
            self._buffers.views(_sizes(shape)), shape, tables=tables, sampled=self._sampled,
            block_size=self._kv_cache.block_size, logits_rows=wanted,
            adapters=None if rows is None else StepAdapters(rows, rows),
        )  # fmt: skip
        self._hidden[: shape.num_tokens].copy_(self._decoder.hidden_states(model_input, self._kv_cache))


def _sizes(shape: StepShape) -> StepSizes:
    return StepSizes(shape.num_tokens, shape.num_seqs, 0, 0)
