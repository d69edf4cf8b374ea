"""How far a model's next-token distributions are from a reference's, position by position.

The reference keeps its most likely tokens and their log-probabilities, not the whole vocabulary: everything else counts
as one event. What the divergence loses by that is less than a hundredth of it (``test_bench_quality``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from teacher_forced import Chunk

NUM_KEPT = 512
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Reference:
    """Of N positions, on the CPU."""

    logprobs: Tensor
    """[N] float32, of the tokens that really follow."""
    top_ids: Tensor
    """[N, NUM_KEPT] int32, the most likely token first."""
    top_logprobs: Tensor
    """[N, NUM_KEPT] float32."""


@dataclass(frozen=True)
class Comparison:
    """Of N positions, on the CPU."""

    logprobs: Tensor
    """[N] float32, of the tokens that really follow."""
    divergence: Tensor
    """[N] float32: KL divergence of the reference from the model, in nats."""
    same_top: Tensor
    """[N] bool: whether both hold the same token for the most likely one."""


def refer(chunks: Iterable[Chunk]) -> Reference:
    parts = []
    for chunk in chunks:
        logprobs = torch.log_softmax(chunk.logits, -1)
        top = logprobs.topk(min(NUM_KEPT, logprobs.shape[1]))
        parts.append(Reference(chunk.logprobs.cpu(), top.indices.int().cpu(), top.values.cpu()))
    return Reference(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _names(Reference)})


def compare(reference: Reference, chunks: Iterable[Chunk]) -> Comparison:
    """``chunks``: of the positions of the reference, in the same order."""
    parts = list(_comparisons(reference, chunks))
    return Comparison(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _names(Comparison)})


def _comparisons(reference: Reference, chunks: Iterable[Chunk]) -> Iterator[Comparison]:
    start = 0
    for chunk in chunks:
        rows = slice(start, start + len(chunk.following))
        start = rows.stop
        top_ids = reference.top_ids[rows].to(chunk.logits.device).long()
        expected = reference.top_logprobs[rows].to(chunk.logits.device).double()
        found = torch.log_softmax(chunk.logits, -1).gather(1, top_ids).double()
        shares = expected.exp()
        divergence = (shares * (expected - found)).sum(-1)
        others, found_others = _others(expected), _others(found)
        divergence += others * (others.log() - found_others.log())
        same_top = chunk.logits.argmax(-1) == top_ids[:, 0]
        yield Comparison(chunk.logprobs.cpu(), divergence.float().cpu(), same_top.cpu())


def _others(logprobs: Tensor) -> Tensor:
    """The probability of all tokens but these."""
    return (1 - logprobs.exp().sum(-1)).clamp(min=_SMALLEST)


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


def _names(kind: type[Reference] | type[Comparison]) -> list[str]:
    return [field.name for field in fields(kind)]
