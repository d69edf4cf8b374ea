"""How far a model's next-token distributions are from a reference's, position by position, over the whole vocabulary.

A distribution of every position would take gigabytes. The reference keeps what its head reads, and the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from teacher_forced import Chunk


@dataclass(frozen=True)
class Reference:
    """Of N positions, on the CPU."""

    logprobs: Tensor
    """[N] float32, of the tokens that really follow."""
    hidden: Tensor
    """[N, H]."""
    head: Callable[[Tensor], Tensor]
    """hidden [C, H] on the model's device -> logits [C, vocab]."""


@dataclass(frozen=True)
class Comparison:
    """Of N positions, on the CPU."""

    logprobs: Tensor
    """[N] float32, of the tokens that really follow."""
    divergence: Tensor
    """[N] float32: KL divergence of the reference from the model, in nats."""
    same_top: Tensor
    """[N] bool: whether both hold the same token for the most likely one."""


def refer(chunks: Iterable[Chunk], head: Callable[[Tensor], Tensor]) -> Reference:
    parts = [(chunk.logprobs.cpu(), chunk.hidden.cpu()) for chunk in chunks]
    return Reference(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), head)


def compare(reference: Reference, chunks: Iterable[Chunk]) -> Comparison:
    """``chunks``: of the positions of the reference, in the same order."""
    parts = list(_comparisons(reference, chunks))
    return Comparison(
        logprobs=torch.cat([part.logprobs for part in parts]),
        divergence=torch.cat([part.divergence for part in parts]),
        same_top=torch.cat([part.same_top for part in parts]),
    )


def _comparisons(reference: Reference, chunks: Iterable[Chunk]) -> Iterator[Comparison]:
    start = 0
    for chunk in chunks:
        rows = slice(start, start + len(chunk.following))
        start = rows.stop
        hidden = reference.hidden[rows].to(chunk.logits.device)
        expected = torch.log_softmax(reference.head(hidden).float(), -1)
        found = torch.log_softmax(chunk.logits, -1)
        same_top = expected.argmax(-1) == found.argmax(-1)
        divergence = (expected.exp() * (expected - found)).sum(-1)
        yield Comparison(chunk.logprobs.cpu(), divergence.cpu(), same_top.cpu())


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())
