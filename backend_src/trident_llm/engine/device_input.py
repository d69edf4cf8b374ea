"""From a step's buffers on the device to the decoder's input, for steps that depend on their shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import AttentionMetadata, ModelInput, StepAdapters
from .cuda_graphs import StepShape
from .flat_step import FlatStep

_LONG_CONTEXT = 512
"""Tokens before a chunk from which on it counts as having a long context."""


def device_input(
    fields: Mapping[str, Tensor],
    shape: StepShape,
    *,
    tables: Tensor,
    sampled: Tensor,
    block_size: int,
    logits_rows: Tensor,
    adapters: StepAdapters | None,
) -> ModelInput:
    """fields: of ``StepBuffers``. sampled: the tokens of the step before, which ``sources`` point into."""
    sources = fields["sources"]
    unknown = sampled.index_select(0, sources.clamp(min=0))
    attention = AttentionMetadata(
        slot_mapping=fields["slots"],
        block_tables=tables,
        cu_seqlens_q=fields["cu_seqlens_q"],
        context_lens=fields["context_lens"],
        seq_lens_q=(),
        context_lens_host=(),
        seq_counts=fields["seq_counts"],
        num_decodes=shape.num_decodes,
        num_prefills=shape.num_prefills,
        block_size=block_size,
        long_contexts=shape.long_contexts,
    )
    return ModelInput(
        token_ids=torch.where(sources < 0, fields["token_ids"], unknown),
        positions=fields["positions"],
        logits_rows=logits_rows,
        attention=attention,
        adapters=adapters,
    )


def shape_of(step: FlatStep, *, num_samples: int, adapters: bool, mixed: bool = False) -> StepShape:
    """The shape of a step that is not padded to another."""
    num_prefills = step.num_seqs - step.num_decodes
    return StepShape(
        len(step.token_ids), step.num_decodes, num_prefills, max(step.num_seqs, num_samples),
        has_long_contexts(step), adapters, mixed,
    )  # fmt: skip


def has_long_contexts(step: FlatStep) -> bool:
    chunks = zip(step.context_lens[step.num_decodes :], step.seq_lens_q[step.num_decodes :], strict=True)
    return any(context - num_tokens > _LONG_CONTEXT for context, num_tokens in chunks)


def seq_counts(step: FlatStep, num_seqs: int, *, padded: bool) -> list[int]:
    """Sequences that fill up a step of decodes alone are decodes without context: attention gives them zeros."""
    only_decodes = step.num_decodes == step.num_seqs
    return [num_seqs, num_seqs] if padded and only_decodes else [step.num_decodes, step.num_seqs]


def step_values(step: FlatStep, counts: list[int]) -> dict[str, Any]:
    """What every pass uploads."""
    return {
        "token_ids": step.token_ids,
        "positions": step.positions,
        "slots": step.slots,
        "sources": step.token_sources,
        "context_lens": step.context_lens,
        "cu_seqlens_q": step.cu_seqlens_q,
        "seq_counts": counts,
        "logits_rows": step.logits_rows,
    }
