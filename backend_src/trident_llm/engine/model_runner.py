"""ModelRunner: turns a scheduled step into tensors, runs the decoder and samples. Knows no queues and no requests.

``launch`` starts a step and returns at once where the device works by itself; ``StepResult.tokens`` waits for it. A
step may use tokens of the one before that have not reached the host: they are taken from the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.step_rows import host_rows
from ..models.llama import LlamaDecoder
from ..protocol import TokenLogprobs
from ..sampling.sampler import SamplingRow, sample
from .batch import AttentionMetadata, ModelInput, StepAdapters
from .flat_step import FlatStep, Sample, flatten
from .host_tier import HostCopies, TransferCosts
from .kv_cache import KVCache
from .mix_pass import MixPass, MixWeights, count_modules, plan_mixes
from .scheduler import SchedulerOutput
from .sequence import Sequence


@dataclass(frozen=True)
class SampledToken:
    seq: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
    scalings: list[list[float]] | None = None
    """Of each adapter of the sequence's mix, in all or by layer, where they are wanted."""


@dataclass(frozen=True)
class StepResult:
    """A launched step. ``tokens`` waits until its tokens are on the host."""

    tokens: Callable[[], list[SampledToken]]


class ModelRunner:
    """Owns the decoder and the KV cache. This one computes on the CPU, within ``launch``."""

    graph_bytes = 0
    """Memory of CUDA graphs."""
    transfer_costs: TransferCosts | None = None
    """Of the host tier, which there is none of on a CPU."""

    def __init__(
        self, decoder: LlamaDecoder, kv_cache: KVCache, *, device: torch.device, num_adapter_slots: int = 0
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.device = device
        self.block_size = kv_cache.block_size
        self._num_adapter_slots = num_adapter_slots
        self._mix_pass = MixPass(
            num_slots=num_adapter_slots, num_modules=count_modules(decoder.adaptable_linears()), device=device
        )
        self._sampled_before: dict[Sequence, int] = {}
        self._tokens_before = torch.zeros(0, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> StepResult:
        """Compute one step."""
        self._copy_blocks(output)
        step = flatten(output.scheduled, self.block_size, self._sampled_before)
        mixed = self._mix_weights(output, step)
        logits = self.decoder.forward(self._model_input(step, self._step_adapters(step, mixed)), self.kv_cache)
        tokens = self._sample(logits, step.samples, mixed)
        self._sampled_before = {entry.seq: index for index, entry in enumerate(step.samples)}
        self._tokens_before = torch.tensor([token.token_id for token in tokens], dtype=torch.int64)
        return StepResult(lambda: tokens)

    def capture(self, progress: Callable[[str], None]) -> Iterator[None]:
        """There are no graphs."""
        return iter(())

    def release_graphs(self) -> None:
        """Likewise."""

    def launch_host_copies(self, copies: HostCopies) -> None:
        """There are none without a host tier."""

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._mix_pass.forget(seq)

    def _mix_weights(self, output: SchedulerOutput, step: FlatStep) -> MixWeights | None:
        """Run the first pass of sequences with a mix; None when there are none."""
        plan = plan_mixes(output, self.block_size, self._sampled_before)
        if plan is None:
            return None
        hidden = None
        if plan.step is not None:
            rows = self._mix_pass.pass_rows(plan)
            model_input = self._model_input(plan.step, StepAdapters(rows, rows) if rows else None)
            hidden = self.decoder.hidden_states(model_input, self.kv_cache)
        plain = host_rows(step.blends, step.seq_lens_q, self._num_adapter_slots).weights
        return self._mix_pass.weights(plan, hidden, torch.from_numpy(plain), plain)

    def _copy_blocks(self, output: SchedulerOutput) -> None:
        if output.block_copies:
            self.kv_cache.copy_blocks(
                [copy.source for copy in output.block_copies], [copy.destination for copy in output.block_copies]
            )

    def _sample(self, logits: Tensor, samples: list[Sample], mixed: MixWeights | None) -> list[SampledToken]:
        if not samples:
            return []
        if len(samples) > logits.shape[0]:
            logits = logits[torch.tensor([entry.row for entry in samples], device=self.device)]
        sampled = sample(logits, [self._sampling_row(entry) for entry in samples])
        return [
            SampledToken(entry.seq, token_id, logprobs, mixed.mean_of(entry.seq) if mixed else None)
            for entry, token_id, logprobs in zip(samples, sampled.token_ids, sampled.logprobs, strict=True)
        ]

    def _model_input(self, step: FlatStep, adapters: StepAdapters | None) -> ModelInput:
        token_ids = torch.from_numpy(step.token_ids)
        if step.uses_sources:
            sources = torch.from_numpy(step.token_sources)
            token_ids = torch.where(sources < 0, token_ids, self._tokens_before[sources.clamp(min=0)])
        width = step.table_width
        attention = AttentionMetadata(
            slot_mapping=torch.from_numpy(step.slots),
            block_tables=torch.tensor(
                [table + [0] * (width - len(table)) for table in step.block_tables], dtype=torch.int32
            ),
            cu_seqlens_q=torch.tensor(step.cu_seqlens_q, dtype=torch.int32),
            context_lens=torch.tensor(step.context_lens, dtype=torch.int32),
            seq_lens_q=tuple(step.seq_lens_q),
            context_lens_host=tuple(step.context_lens),
            seq_counts=torch.tensor([step.num_decodes, step.num_seqs], dtype=torch.int32),
            num_decodes=step.num_decodes,
            num_prefills=step.num_seqs - step.num_decodes,
            block_size=self.block_size,
        )
        return ModelInput(
            token_ids=token_ids,
            positions=torch.from_numpy(step.positions),
            logits_rows=torch.tensor(step.logits_rows, dtype=torch.int64),
            attention=attention,
            adapters=adapters,
        )

    def _step_adapters(self, step: FlatStep, mixed: MixWeights | None) -> StepAdapters | None:
        if not step.uses_adapters:
            return None
        tokens = host_rows(step.blends, step.seq_lens_q, self._num_adapter_slots).to_rows()
        rows = host_rows(step.row_blends, [1] * len(step.row_blends), self._num_adapter_slots).to_rows()
        if mixed is not None:
            tokens = dataclasses.replace(tokens, weights=mixed.weights)
            rows = dataclasses.replace(rows, weights=mixed.weights[:, step.logits_rows])
        return StepAdapters(tokens, rows)

    def _sampling_row(self, entry: Sample) -> SamplingRow:
        seq, tokens = entry.seq, entry.seq.token_ids
        if len(tokens) < entry.position:
            tokens = [*tokens, int(self._tokens_before[self._sampled_before[seq]])]
        return SamplingRow(
            params=seq.params,
            sample_index=seq.sample_index,
            position=entry.position,
            token_ids=tokens,
            num_prompt_tokens=seq.num_prompt_tokens,
            stop_ids=seq.stop_ids,
        )
