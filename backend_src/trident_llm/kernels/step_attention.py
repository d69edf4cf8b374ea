"""Paged attention of a whole step in the Triton language: which kernel attends for which of its sequences.

Sequences with one token come first, also on the token axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.batch import AttentionMetadata
from .decode_attention import allocate_workspace, choose_num_splits, decode_attention
from .layer_cache import LayerCache
from .prefill_attention import (
    PrefillWorkspace,
    allocate_prefill_workspace,
    choose_prefill_splits,
    default_config,
    prefill_attention,
)
from .prefill_attention_hopper import prefill_attention_hopper, takes


@dataclass(frozen=True)
class AttentionPlan:
    """A step's attention: device tensors, and host constants that a graph's bucket fixes."""

    slots: Tensor
    """[T] int64."""
    block_tables: Tensor
    """[S, max_blocks] int32."""
    cu_seqlens_q: Tensor
    """[S + 1] int32."""
    context_lens: Tensor
    """[S] int32."""
    seq_counts: Tensor
    """[2] int32: sequences with one token, and all sequences."""
    num_decodes: int
    """At most so many sequences have one token."""
    num_prefills: int
    """At most so many have several."""
    max_context: int
    """Tokens that the block tables have room for."""
    sliding_window: int | None
    long_contexts: bool = False
    """See AttentionMetadata."""


def plan_attention(metadata: AttentionMetadata, sliding_window: int | None) -> AttentionPlan:
    """See ``Kernels``."""
    return AttentionPlan(
        slots=metadata.slot_mapping,
        block_tables=metadata.block_tables,
        cu_seqlens_q=metadata.cu_seqlens_q,
        context_lens=metadata.context_lens,
        seq_counts=metadata.seq_counts,
        num_decodes=metadata.num_decodes,
        num_prefills=metadata.num_prefills,
        max_context=metadata.block_tables.shape[1] * metadata.block_size,
        sliding_window=sliding_window,
        long_contexts=metadata.long_contexts,
    )


class StepAttention:
    """Holds no tensors: workspaces come from torch's allocator.

    num_processors: multiprocessors of the device. pdl: whether it knows programmatic dependent launch. hopper: whether
    it has Hopper's matrix instructions.
    """

    def __init__(self, *, num_processors: int, pdl: bool, hopper: bool) -> None:
        self._num_processors = num_processors
        self._pdl = pdl
        self._hopper = hopper

    def __call__(
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, soft_cap: float | None
    ) -> Tensor:
        """``Kernels.paged_attention``."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decodes = plan.num_decodes
        if decodes:
            num_kv_heads, head_dim = cache.values.shape[3:]
            window = min(plan.max_context, plan.sliding_window or plan.max_context)
            num_splits = choose_num_splits(decodes, num_kv_heads, window, self._num_processors)
            workspace = allocate_workspace(decodes, q.shape[1], num_splits, head_dim, q.device)
            decode_attention(
                q[:decodes], cache, plan.block_tables[:decodes], plan.context_lens[:decodes],
                plan.seq_counts, out[:decodes], workspace, num_splits=num_splits, scale=scale, soft_cap=soft_cap,
                sliding_window=plan.sliding_window, pdl=self._pdl,
            )  # fmt: skip
        if plan.num_prefills:
            self._attend_prefills(q, cache, plan, out, scale, soft_cap)
        return out.flatten(1)

    def _attend_prefills(
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, out: Tensor, scale: float, soft_cap: float | None
    ) -> None:
        workspace = self._prefill_workspace(q, cache, plan)
        operands = (q, cache, plan.block_tables, plan.cu_seqlens_q, plan.context_lens, plan.seq_counts, out)
        if self._hopper and workspace is None and takes(q, cache, soft_cap, plan.sliding_window):
            prefill_attention_hopper(
                *operands, max_tokens=q.shape[0], max_seqs=plan.num_prefills, scale=scale,
                num_processors=self._num_processors, pdl=self._pdl,
            )  # fmt: skip
            return
        prefill_attention(
            *operands, max_tokens=q.shape[0], max_seqs=plan.num_prefills, scale=scale, soft_cap=soft_cap,
            sliding_window=plan.sliding_window, workspace=workspace, pdl=self._pdl,
        )  # fmt: skip

    def _prefill_workspace(self, q: Tensor, cache: LayerCache, plan: AttentionPlan) -> PrefillWorkspace | None:
        """None where the step's tiles fill the device without splits, or are over soon anyway."""
        if not plan.long_contexts:
            return None
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = cache.values.shape[3]
        group = num_heads // num_kv_heads
        tile_tokens = default_config(q.dtype, head_dim, group).tile_rows // group
        max_keys = plan.max_context
        if plan.sliding_window is not None:
            max_keys = min(max_keys, plan.sliding_window + tile_tokens)
        num_splits = choose_prefill_splits(-(-num_tokens // tile_tokens), num_kv_heads, max_keys, self._num_processors)
        return allocate_prefill_workspace(q, num_splits) if num_splits > 1 else None
