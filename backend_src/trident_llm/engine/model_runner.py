"""ModelRunner: turns a scheduled step into tensors, runs the decoder and samples. Knows no queues and no requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.llama import LlamaDecoder
from ..protocol import TokenLogprobs
from ..sampling.sampler import SamplingRow, sample
from .batch import AttentionMetadata, ModelInput
from .kv_cache import KVCache
from .scheduler import SchedulerOutput
from .sequence import Sequence


@dataclass(frozen=True)
class SampledToken:
    seq: Sequence
    token_id: int
    logprobs: TokenLogprobs | None


class ModelRunner:
    """Owns the decoder and the KV cache."""

    def __init__(self, decoder: LlamaDecoder, kv_cache: KVCache, *, device: torch.device) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.device = device
        self.block_size = kv_cache.block_size

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> list[SampledToken]:
        """Compute one step; the tokens are on the host when this returns."""
        if output.block_copies:
            self.kv_cache.copy_blocks(
                [copy.source for copy in output.block_copies], [copy.destination for copy in output.block_copies]
            )
        logits = self.decoder.forward(self._model_input(output), self.kv_cache)
        sampling = [item for item in output.scheduled if item.sampled]
        samples = [(row, seq) for row, item in enumerate(sampling) for seq in item.sampled]
        if not samples:
            return []
        if len(samples) > logits.shape[0]:
            logits = logits[torch.tensor([row for row, _ in samples], device=self.device)]
        sampled = sample(logits, [_sampling_row(seq) for _, seq in samples])
        return [
            SampledToken(seq, token_id, logprobs)
            for (_, seq), token_id, logprobs in zip(samples, sampled.token_ids, sampled.logprobs, strict=True)
        ]

    def _model_input(self, output: SchedulerOutput) -> ModelInput:
        """Flatten the step's sequences onto one token axis."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        logits_rows: list[int] = []
        size = self.block_size
        for item in output.scheduled:
            seq, end = item.seq, item.start + item.num_tokens
            token_ids.extend(seq.token_ids[item.start : end])
            positions.extend(range(item.start, end))
            table = seq.block_table
            slots.extend(table[p // size] * size + p % size for p in range(item.start, end))
            starts.append(starts[-1] + item.num_tokens)
            if item.sampled:
                logits_rows.append(starts[-1] - 1)
        context_lens = tuple(item.start + item.num_tokens for item in output.scheduled)
        # Blocks beyond the context (reserved for later chunks) are left out: they cost attention a wider table.
        tables = [
            item.seq.block_table[: -(-length // size)]
            for item, length in zip(output.scheduled, context_lens, strict=True)
        ]
        width = max(map(len, tables))
        attention = AttentionMetadata(
            slot_mapping=self._tensor(slots, torch.int64),
            block_tables=self._tensor([table + [0] * (width - len(table)) for table in tables], torch.int32),
            cu_seqlens_q=self._tensor(starts, torch.int32),
            context_lens=self._tensor(context_lens, torch.int32),
            seq_lens_q=tuple(item.num_tokens for item in output.scheduled),
            context_lens_host=context_lens,
            num_decodes=sum(item.num_tokens == 1 for item in output.scheduled),
            block_size=size,
        )
        return ModelInput(
            token_ids=self._tensor(token_ids, torch.int64),
            positions=self._tensor(positions, torch.int64),
            logits_rows=self._tensor(logits_rows, torch.int64),
            attention=attention,
        )

    def _tensor(self, values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _sampling_row(seq: Sequence) -> SamplingRow:
    return SamplingRow(
        params=seq.params,
        sample_index=seq.sample_index,
        position=seq.num_tokens - 1,
        token_ids=seq.token_ids,
        num_prompt_tokens=seq.num_prompt_tokens,
        stop_ids=seq.stop_ids,
    )
