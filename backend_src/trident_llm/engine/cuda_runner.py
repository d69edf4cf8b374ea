"""CudaRunner: runs steps on a GPU without ever waiting for it, as CUDA graphs wherever a captured shape holds them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..adapters.step_rows import host_rows
from ..kernels.lora_layer import LoraRows
from ..models.llama import LlamaDecoder
from ..sampling.cuda_sampler import CudaSampler, DeviceSamples
from .batch import StepAdapters
from .cuda_first_pass import CudaFirstPass
from .cuda_graphs import CudaGraphs, StepShape, graph_shapes
from .device_input import device_input, seq_counts, shape_of, step_values
from .flat_step import FlatStep, Sample, flatten
from .host_tier import HostCopies, TransferCosts
from .host_transfers import HostTransfers
from .kv_cache import KVCache
from .mix_pass import MixPass, MixPlan, MixWeights, count_modules, plan_mixes
from .model_runner import SampledToken, StepResult
from .scheduler import SchedulerOutput
from .sequence import Sequence
from .step_buffers import StepBuffers, StepSizes
from .to_device import to_host


class CudaRunner:
    """Owns the decoder, the KV cache, the step buffers and the graphs. Takes the same calls as ModelRunner."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        kv_cache: KVCache,
        *,
        device: torch.device,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_host_blocks: int,
        num_adapter_slots: int,
        captures_mixes: bool,
        progress: Callable[[str], None],
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.device = device
        self.block_size = kv_cache.block_size
        self._num_adapter_slots = num_adapter_slots
        largest = StepSizes(max_num_batched_tokens, max_num_seqs, max_num_seqs, max_num_seqs, num_adapter_slots)
        width = -(-max_model_len // self.block_size)
        self._buffers = StepBuffers(largest, table_width=width, device=device)
        self._sampler = CudaSampler(max_samples=max_num_seqs, vocab_size=decoder.config.vocab_size, device=device)
        self._sampled_before: dict[Sequence, int] = {}
        self._logits = torch.zeros(max_num_seqs, decoder.config.vocab_size, dtype=torch.float32, device=device)
        """Written by every step; read by the sampler right after it."""
        self._mix_pass = MixPass(
            num_slots=num_adapter_slots, num_modules=count_modules(decoder.adaptable_linears()), device=device
        )
        num_weights = self._mix_pass.num_modules * max_num_batched_tokens * num_adapter_slots
        self._mix_weights = torch.zeros(num_weights if captures_mixes else 0, device=device)
        """What a step with mixes takes of each slot in each module; see ``_mixed_weights``."""
        self._mixed_by: MixWeights | None = None
        """What they were written from. Steps without mixes leave them as they are."""
        with_adapters = num_adapter_slots > 0
        shapes = graph_shapes(
            max_num_seqs, max_num_batched_tokens, adapters=with_adapters, mixes=captures_mixes
        )
        self._graphs = CudaGraphs(shapes, self._captured_forward)
        self._first_pass = CudaFirstPass(
            decoder, kv_cache, sampled=self._sampler.token_ids, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, table_width=width,
            shapes=graph_shapes(max_num_seqs, max_num_batched_tokens) if captures_mixes else (),
        )  # fmt: skip
        self._transfers = HostTransfers(kv_cache, num_host_blocks) if num_host_blocks else None
        self.transfer_costs: TransferCosts | None = None
        """What the host tier decides by; None without one."""
        for _ in self.capture(progress):
            pass

    @property
    def graph_bytes(self) -> int:
        """Memory of CUDA graphs."""
        return self._graphs.num_bytes + self._first_pass.graph_bytes

    def capture(self, progress: Callable[[str], None]) -> Iterator[None]:
        """Capture all graphs on the weights that the decoder has now, one between two values.

        Overwrites the KV cache. No step may be in flight, nor another thread use the device.
        """
        torch.cuda.synchronize()
        self._buffers.clear()
        yield from self._graphs.capture(progress)
        yield from self._first_pass.capture(progress)
        if self._transfers is not None:
            self.transfer_costs = self._measure_transfer_costs(self._transfers)

    def release_graphs(self) -> None:
        """Drop the graphs: the weights that they read are about to go. No step may be in flight."""
        torch.cuda.synchronize()
        self._graphs.release()
        self._first_pass.release_graphs()

    @torch.inference_mode()
    def _measure_transfer_costs(self, transfers: HostTransfers) -> TransferCosts:
        """Writes to the KV cache."""
        shape = self._graphs.largest_prefill
        self._graphs.replay(shape)
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._graphs.replay(shape)
        torch.cuda.synchronize()
        token_seconds = (time.perf_counter() - began) / shape.num_tokens
        return TransferCosts(transfers.measure_block_seconds(), token_seconds)

    @torch.inference_mode()
    def launch_host_copies(self, copies: HostCopies) -> None:
        """To be called before each step's ``launch``, and for a step that has copies alone."""
        if self._transfers is not None:
            self._transfers.launch(copies)

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> StepResult:
        """Start one step; its tokens come with ``tokens()`` of the result."""
        if output.block_copies:
            self.kv_cache.copy_blocks(
                [copy.source for copy in output.block_copies], [copy.destination for copy in output.block_copies]
            )
        plan = plan_mixes(output, self.block_size, self._sampled_before)
        step = flatten(output.scheduled, self.block_size, self._sampled_before)
        # Samples that fork off here can outnumber the sequences.
        own = shape_of(step, num_samples=len(step.samples), adapters=step.uses_adapters, mixed=plan is not None)
        shape = self._graphs.find_shape(own)
        sizes = self._sizes(shape) if shape else self._exact_sizes(step)
        counts = seq_counts(step, sizes.num_seqs, padded=shape is not None)
        values = self._values(step, counts)
        self._buffers.upload(sizes, values, step.block_tables)
        means = self._find_weights(plan, values["adapter_weights"], sizes) if plan else {}
        if shape is None:
            tables = self._buffers.block_tables[: sizes.num_seqs, : step.table_width]
            self._forward(dataclasses.replace(own, num_seqs=sizes.num_seqs), sizes, tables)
        else:
            self._graphs.replay(shape)
        self._sampled_before = {entry.seq: index for index, entry in enumerate(step.samples)}
        sampled = None
        if step.samples:
            sampled = self._sampler.sample(self._logits, step.samples, self._buffers.views(sizes))
        ended = torch.cuda.Event()
        ended.record()
        return StepResult(lambda: _tokens(ended, sampled, step.samples, means))

    def _find_weights(
        self, plan: MixPlan, plain_on_host: NDArray[np.float32], sizes: StepSizes
    ) -> dict[Sequence, Tensor]:
        """Run the first pass and put what it says where the second reads it; scalings on their way to the host."""
        hidden = self._first_pass.run(plan.step, self._mix_pass.pass_rows(plan)) if plan.step else None
        plain = self._buffers.views(sizes)["adapter_weights"].view(sizes.num_tokens, sizes.num_slots)
        found = self._mix_pass.weights(plan, hidden, plain, plain_on_host)
        if found is not self._mixed_by:
            if self._mix_weights.numel() < found.weights.numel():
                self._mix_weights = found.weights.flatten()  # no graph reads it
            else:
                self._mixed_weights(sizes).copy_(found.weights)
            self._mixed_by = found
        return {seq: to_host(mean) for seq, mean in found.means.items()}

    def _mixed_weights(self, sizes: StepSizes) -> Tensor:
        """[M, T, S]: at an address that depends on the sizes alone."""
        shape = (self._mix_pass.num_modules, sizes.num_tokens, sizes.num_slots)
        return self._mix_weights[: shape[0] * shape[1] * shape[2]].view(shape)

    def _exact_sizes(self, step: FlatStep) -> StepSizes:
        num_slots = self._num_adapter_slots if step.uses_adapters else 0
        return StepSizes(len(step.token_ids), step.num_seqs, len(step.logits_rows), len(step.samples), num_slots)

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._sampler.forget(seq)
        self._mix_pass.forget(seq)

    def _values(self, step: FlatStep, counts: list[int]) -> dict[str, Any]:
        return {
            **step_values(step, counts),
            **self._sampler.field_values(step.samples),
            **self._adapter_values(step),
        }

    def _adapter_values(self, step: FlatStep) -> dict[str, Any]:
        if not step.uses_adapters:
            return {}
        tokens = host_rows(step.blends, step.seq_lens_q, self._num_adapter_slots)
        rows = host_rows(step.row_blends, [1] * len(step.row_blends), self._num_adapter_slots)
        return {
            "adapter_weights": tokens.weights.reshape(-1),
            "adapter_tiles": tokens.tile_slots.reshape(-1),
            "adapter_row_tiles": rows.tile_slots.reshape(-1),
        }

    def _step_adapters(self, fields: dict[str, Tensor], sizes: StepSizes, mixed: bool) -> StepAdapters | None:
        if not sizes.num_slots:
            return None
        weights = fields["adapter_weights"].view(1, sizes.num_tokens, sizes.num_slots)
        if mixed:
            weights = self._mixed_weights(sizes)
        row_weights = weights.index_select(1, fields["logits_rows"])
        return StepAdapters(
            tokens=LoraRows(weights, fields["adapter_tiles"].view(-1, sizes.num_slots)),
            rows=LoraRows(row_weights, fields["adapter_row_tiles"].view(-1, sizes.num_slots)),
        )

    def _sizes(self, shape: StepShape) -> StepSizes:
        num_slots = self._num_adapter_slots if shape.adapters else 0
        return StepSizes(shape.num_tokens, shape.num_seqs, shape.num_seqs, shape.num_seqs, num_slots)

    def _captured_forward(self, shape: StepShape) -> None:
        self._forward(shape, self._sizes(shape), self._buffers.block_tables[: shape.num_seqs])

    def _forward(self, shape: StepShape, sizes: StepSizes, tables: Tensor) -> None:
        """Launch a step on whatever the buffers hold."""
        fields = self._buffers.views(sizes)
        model_input = device_input(
            fields, shape, tables=tables, sampled=self._sampler.token_ids, block_size=self.block_size,
            logits_rows=fields["logits_rows"], adapters=self._step_adapters(fields, sizes, shape.mixed),
        )  # fmt: skip
        self.decoder.forward(model_input, self.kv_cache, self._logits[: sizes.num_rows])


def _tokens(
    ended: torch.cuda.Event, sampled: DeviceSamples | None, samples: list[Sample], means: dict[Sequence, Tensor]
) -> list[SampledToken]:
    # Waited for without samples too: the pinned buffers of this step are filled again in two steps.
    ended.synchronize()
    if sampled is None:
        return []
    logprobs = sampled.token_logprobs(samples)
    return [
        SampledToken(entry.seq, token_id, entry_logprobs, means[entry.seq].tolist() if entry.seq in means else None)
        for entry, token_id, entry_logprobs in zip(samples, sampled.token_ids.tolist(), logprobs, strict=True)
    ]
