"""CudaRunner: runs steps on a GPU without ever waiting for it, decodes as CUDA graphs, prompts eagerly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.llama import LlamaDecoder
from ..sampling.cuda_sampler import CudaSampler, DeviceSamples
from .batch import AttentionMetadata, ModelInput
from .cuda_graphs import CudaGraphs, decode_buckets
from .flat_step import FlatStep, Sample, flatten
from .kv_cache import KVCache
from .model_runner import SampledToken, StepResult
from .scheduler import SchedulerOutput
from .sequence import Sequence
from .step_buffers import StepBuffers, StepSizes


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
        self._graphs = CudaGraphs(decode_buckets(max_num_seqs), self._decode_forward)
        with torch.inference_mode():
            self.graph_bytes = self._graphs.capture(progress)

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> StepResult:
        """Start one step; its tokens come with ``tokens()`` of the result."""
        if output.block_copies:
            self.kv_cache.copy_blocks(
                [copy.source for copy in output.block_copies], [copy.destination for copy in output.block_copies]
            )
        step = flatten(output, self.block_size, self._sampled_before)
        num_seqs = len(step.seq_lens_q)
        # Samples that fork off here can outnumber the sequences.
        rows = max(num_seqs, len(step.samples))
        bucket = self._graphs.bucket_for(rows) if step.num_decodes == num_seqs else None
        if bucket is None:
            sizes = StepSizes(len(step.token_ids), num_seqs, len(step.logits_rows), len(step.samples))
        else:
            sizes = StepSizes(bucket, bucket, bucket, bucket)
        self._buffers.upload(sizes, self._values(step), step.block_tables)
        logits = self._eager_forward(step, sizes) if bucket is None else self._graphs.replay(bucket)
        self._sampled_before = {entry.seq: index for index, entry in enumerate(step.samples)}
        sampled = None
        if step.samples:
            sampled = self._sampler.sample(logits, step.samples, self._buffers.views(sizes))
        ended = torch.cuda.Event()
        ended.record()
        return StepResult(lambda: _tokens(ended, sampled, step.samples))

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._sampler.forget(seq)

    def _values(self, step: FlatStep) -> dict[str, list]:
        return {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "slots": step.slots,
            "sources": step.token_sources,
            "context_lens": step.context_lens,
            "cu_seqlens_q": step.cu_seqlens_q,
            "logits_rows": step.logits_rows,
            **self._sampler.field_values(step.samples),
        }

    def _decode_forward(self, bucket: int) -> Tensor:
        """Launch a step of ``bucket`` decodes on whatever the buffers hold."""
        fields = self._buffers.views(StepSizes(bucket, bucket, bucket, bucket))
        tables = self._buffers.block_tables[:bucket]
        return self._forward(fields, tables, seq_lens_q=(1,) * bucket, num_decodes=bucket)

    def _eager_forward(self, step: FlatStep, sizes: StepSizes) -> Tensor:
        tables = self._buffers.block_tables[: sizes.num_seqs, : step.table_width]
        return self._forward(
            self._buffers.views(sizes), tables, seq_lens_q=tuple(step.seq_lens_q), num_decodes=step.num_decodes
        )

    def _forward(
        self, fields: dict[str, Tensor], tables: Tensor, *, seq_lens_q: tuple[int, ...], num_decodes: int
    ) -> Tensor:
        sources = fields["sources"]
        unknown = self._sampler.token_ids.index_select(0, sources.clamp(min=0))
        attention = AttentionMetadata(
            slot_mapping=fields["slots"],
            block_tables=tables,
            cu_seqlens_q=fields["cu_seqlens_q"],
            context_lens=fields["context_lens"],
            seq_lens_q=seq_lens_q,
            context_lens_host=(),
            num_decodes=num_decodes,
            block_size=self.block_size,
        )
        model_input = ModelInput(
            token_ids=torch.where(sources < 0, fields["token_ids"], unknown),
            positions=fields["positions"],
            logits_rows=fields["logits_rows"],
            attention=attention,
        )
        return self.decoder.forward(model_input, self.kv_cache)


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
