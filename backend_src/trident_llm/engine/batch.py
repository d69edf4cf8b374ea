"""What one step feeds the model: flat token tensors and the metadata attention needs.

All sequences of a step lie one after another on a single token axis; a sequence that decodes contributes one
token, one that computes its prompt a chunk. Decodes come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.lora_layer import LoraRows


@dataclass(frozen=True)
class AttentionMetadata:
    """Where this step's tokens belong in the paged KV cache.

    S sequences with T tokens in all. Those with exactly one token, the decodes, come first. The tensors may have room
    for more: ``seq_counts`` says how many there are, the host's counts how many there can be.
    """

    slot_mapping: Tensor
    """[T] int64: block_id * block_size + offset that each token's K and V are written to."""
    block_tables: Tensor
    """[S, max_blocks] int32: block ids of each sequence, padded with 0."""
    cu_seqlens_q: Tensor
    """[S + 1] int32: where each sequence's tokens start; last entry T."""
    context_lens: Tensor
    """[S] int32: tokens of each sequence in the cache once this step's are written."""
    seq_lens_q: tuple[int, ...]
    """Tokens of each sequence in this step, on the host; empty where the step depends on its shape alone."""
    context_lens_host: tuple[int, ...]
    """``context_lens`` on the host; empty likewise."""
    seq_counts: Tensor
    """[2] int32: number of decodes, and of sequences in all."""
    num_decodes: int
    """At most so many sequences are decodes; exactly so many where ``seq_lens_q`` is known."""
    num_prefills: int
    """At most so many sequences follow them."""
    block_size: int
    long_contexts: bool = False
    """Whether some sequence that is no decode has a context much longer than its tokens of this step. A hint: results
    do not depend on it."""


@dataclass(frozen=True)
class StepAdapters:
    """Which adapters a step's tokens take."""

    tokens: LoraRows
    """Of the token axis."""
    rows: LoraRows
    """Of ``logits_rows``."""


@dataclass(frozen=True)
class ModelInput:
    """One step's input to the decoder."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    logits_rows: Tensor
    """[R] int64: indices into the token axis whose logits are wanted. Nothing else of the last layer's output is."""
    attention: AttentionMetadata
    adapters: StepAdapters | None = None
    """None: no token takes any."""
