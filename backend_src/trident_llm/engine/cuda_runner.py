"""CudaRunner: runs steps on a GPU without ever waiting for it, as CUDA graphs wherever a captured shape holds them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.llama import LlamaDecoder
from ..sampling.cuda_sampler import CudaSampler, DeviceSamples
from .batch import AttentionMetadata, ModelInput
from .cuda_graphs import CudaGraphs, StepShape, graph_shapes
from .flat_step import FlatStep, Sample, flatten
from .host_tier import HostCopies, TransferCosts
from .host_transfers import HostTransfers
from .kv_cache import KVCache
from .model_runner import SampledToken, StepResult
from .scheduler import SchedulerOutput
from .sequence import Sequence
from .step_buffers import StepBuffers, StepSizes

_LONG_CONTEXT = 512
"""Tokens before a chunk from which on it counts as having a long context."""


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
        progress: Callable[[str], None],
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.device = device
        self.block_size = kv_cache.block_size
        largest = StepSizes(max_num_batched_tokens, max_num_seqs, max_num_seqs, max_num_seqs)
        width = -(-max_model_len // self.block_size)
        self._buffers = StepBuffers(largest, table_width=width, device=device)
        self._sampler = CudaSampler(max_samples=max_num_seqs, vocab_size=decoder.config.vocab_size, device=device)
        self._sampled_before: dict[Sequence, int] = {}
        self._logits = torch.zeros(max_num_seqs, decoder.config.vocab_size, dtype=torch.float32, device=device)
        """Written by every step; read by the sampler right after it."""
        self._graphs = CudaGraphs(graph_shapes(max_num_seqs, max_num_batched_tokens), self._captured_forward)
        with torch.inference_mode():
            self.graph_bytes = self._graphs.capture(progress)
        self._transfers = HostTransfers(kv_cache, num_host_blocks) if num_host_blocks else None
        self.transfer_costs = self._measure_transfer_costs(self._transfers) if self._transfers else None
        """What the host tier decides by; None without one."""

    @torch.inference_mode()
    def _measure_transfer_costs(self, transfers: HostTransfers) -> TransferCosts:
        """Writes to the KV cache, so it comes before the first step."""
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
        step = flatten(output, self.block_size, self._sampled_before)
        num_prefills = step.num_seqs - step.num_decodes
        long_contexts = _has_long_contexts(step)
        shape = self._graphs.find(
            num_tokens=len(step.token_ids),
            num_decodes=step.num_decodes,
            num_prefills=num_prefills,
            # Samples that fork off here can outnumber the sequences.
            num_samples=max(step.num_seqs, len(step.samples)),
            long_contexts=long_contexts,
        )
        if shape is None:
            sizes = StepSizes(len(step.token_ids), step.num_seqs, len(step.logits_rows), len(step.samples))
        else:
            sizes = _sizes(shape)
        # Sequences that fill up a step of decodes alone are decodes without context: attention gives them zeros.
        padded = shape is not None and not num_prefills
        counts = [sizes.num_seqs, sizes.num_seqs] if padded else [step.num_decodes, step.num_seqs]
        self._buffers.upload(sizes, self._values(step, counts), step.block_tables)
        if shape is None:
            tables = self._buffers.block_tables[: sizes.num_seqs, : step.table_width]
            self._forward(sizes, tables, step.num_decodes, num_prefills, long_contexts)
        else:
            self._graphs.replay(shape)
        self._sampled_before = {entry.seq: index for index, entry in enumerate(step.samples)}
        sampled = None
        if step.samples:
            sampled = self._sampler.sample(self._logits, step.samples, self._buffers.views(sizes))
        ended = torch.cuda.Event()
        ended.record()
        return StepResult(lambda: _tokens(ended, sampled, step.samples))

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._sampler.forget(seq)

    def _values(self, step: FlatStep, seq_counts: list[int]) -> dict[str, Any]:
        return {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "slots": step.slots,
            "sources": step.token_sources,
            "context_lens": step.context_lens,
            "cu_seqlens_q": step.cu_seqlens_q,
            "seq_counts": seq_counts,
            "logits_rows": step.logits_rows,
            **self._sampler.field_values(step.samples),
        }

    def _captured_forward(self, shape: StepShape) -> None:
        tables = self._buffers.block_tables[: shape.num_seqs]
        self._forward(_sizes(shape), tables, shape.num_decodes, shape.num_prefills, shape.long_contexts)

    def _forward(
        self, sizes: StepSizes, tables: Tensor, num_decodes: int, num_prefills: int, long_contexts: bool
    ) -> None:
        """Launch a step on whatever the buffers hold."""
        fields = self._buffers.views(sizes)
        sources = fields["sources"]
        unknown = self._sampler.token_ids.index_select(0, sources.clamp(min=0))
        attention = AttentionMetadata(
            slot_mapping=fields["slots"],
            block_tables=tables,
            cu_seqlens_q=fields["cu_seqlens_q"],
            context_lens=fields["context_lens"],
            seq_lens_q=(),
            context_lens_host=(),
            seq_counts=fields["seq_counts"],
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            block_size=self.block_size,
            long_contexts=long_contexts,
        )
        model_input = ModelInput(
            token_ids=torch.where(sources < 0, fields["token_ids"], unknown),
            positions=fields["positions"],
            logits_rows=fields["logits_rows"],
            attention=attention,
        )
        self.decoder.forward(model_input, self.kv_cache, self._logits[: sizes.num_rows])


def _sizes(shape: StepShape) -> StepSizes:
    return StepSizes(shape.num_tokens, shape.num_seqs, shape.num_seqs, shape.num_seqs)


def _has_long_contexts(step: FlatStep) -> bool:
    chunks = zip(step.context_lens[step.num_decodes :], step.seq_lens_q[step.num_decodes :], strict=True)
    return any(context - num_tokens > _LONG_CONTEXT for context, num_tokens in chunks)


def _tokens(ended: torch.cuda.Event, sampled: DeviceSamples | None, samples: list[Sample]) -> list[SampledToken]:
    # Waited for without samples too: the pinned buffers of this step are filled again in two steps.
    ended.synchronize()
    if sampled is None:
        return []
    logprobs = sampled.token_logprobs(samples)
    return [
        SampledToken(entry.seq, token_id, entry_logprobs)
        for entry, token_id, entry_logprobs in zip(samples, sampled.token_ids.tolist(), logprobs, strict=True)
    ]
