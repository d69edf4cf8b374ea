"""FlatStep: a scheduled step as arrays on one token axis, still on the host."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Blend
from ..adapters.mix import MixUse
from .scheduler import ScheduledSequence
from .sequence import Sequence


@dataclass(frozen=True)
class Sample:
    """``seq`` gets a token from the logits of row ``row`` (counted among ``logits_rows``)."""

    seq: Sequence
    row: int
    position: int
    """Index of the new token in its sequence."""


@dataclass(frozen=True)
class FlatStep:
    """T tokens of S sequences; the meanings are those of ModelInput and AttentionMetadata."""

    token_ids: NDArray[np.int64]
    token_sources: NDArray[np.int64]
    """[T]: where a token that the host does not know yet lies among the previous step's samples; else -1."""
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    cu_seqlens_q: list[int]
    context_lens: list[int]
    seq_lens_q: list[int]
    block_tables: list[list[int]]
    """Blocks beyond the context (reserved for later chunks) are left out: they would only widen the table. Where a
    sliding window has passed, RELEASED stands; attention never reads these entries."""
    logits_rows: list[int]
    samples: list[Sample]
    num_decodes: int
    blends: list[Blend | MixUse | None]
    """[S]."""
    row_blends: list[Blend | MixUse | None]
    """Of ``logits_rows``."""

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_q)

    @property
    def table_width(self) -> int:
        return max(map(len, self.block_tables))

    @property
    def uses_adapters(self) -> bool:
        return any(blend is not None for blend in self.blends)

    @property
    def uses_sources(self) -> bool:
        return bool((self.token_sources >= 0).any())


class _Tokens:
    """The token axis while it is filled: single tokens one by one, chunks of prompts as arrays."""

    def __init__(self, num_tokens: int, block_size: int, sampled_before: Mapping[Sequence, int]) -> None:
        self.ids = np.zeros(num_tokens, dtype=np.int64)
        self.sources = np.full(num_tokens, -1, dtype=np.int64)
        self.positions = np.empty(num_tokens, dtype=np.int64)
        self.slots = np.empty(num_tokens, dtype=np.int64)
        self._block_size = block_size
        self._sampled_before = sampled_before

    def add_decodes(self, items: Collection[ScheduledSequence]) -> None:
        """Items of one token each, at the beginning of the axis."""
        size, count = self._block_size, len(items)
        self.ids[:count] = [item.seq.token_ids[item.start] if _is_known(item) else 0 for item in items]
        self.sources[:count] = [-1 if _is_known(item) else self._sampled_before[item.seq] for item in items]
        self.positions[:count] = [item.start for item in items]
        self.slots[:count] = [
            item.seq.block_table[item.start // size] * size + item.start % size for item in items
        ]

    def add_chunk(self, item: ScheduledSequence, at: int) -> None:
        seq, start, end = item.seq, item.start, item.start + item.num_tokens
        known = seq.token_ids[start:end]
        self.ids[at : at + len(known)] = known
        if len(known) < item.num_tokens:
            # At most the last token is unknown: nothing is scheduled beyond a token that was never sampled.
            self.sources[at + item.num_tokens - 1] = self._sampled_before[seq]
        positions = np.arange(start, end)
        first_block = start // self._block_size
        blocks = np.array(seq.block_table[first_block : -(-end // self._block_size)])
        span = slice(at, at + item.num_tokens)
        self.positions[span] = positions
        self.slots[span] = blocks[positions // self._block_size - first_block] * self._block_size
        self.slots[span] += positions % self._block_size


def _is_known(item: ScheduledSequence) -> bool:
    """Whether the host knows the token of an item that has one."""
    return item.start < len(item.seq.token_ids)


def flatten(
    scheduled: Seq[ScheduledSequence], block_size: int, sampled_before: Mapping[Sequence, int]
) -> FlatStep:
    """``scheduled``: decodes first. ``sampled_before`` holds the sequences that the previous step sampled, with their
    index there."""
    num_decodes = sum(item.num_tokens == 1 for item in scheduled)
    starts = [0, *itertools.accumulate(item.num_tokens for item in scheduled)]
    tokens = _Tokens(starts[-1], block_size, sampled_before)
    tokens.add_decodes(scheduled[:num_decodes])
    for item, start in zip(scheduled[num_decodes:], starts[num_decodes:-1], strict=True):
        tokens.add_chunk(item, start)
    logits_rows: list[int] = []
    samples: list[Sample] = []
    for item, end in zip(scheduled, starts[1:], strict=True):
        if item.sampled:
            position = item.start + item.num_tokens
            samples += [Sample(sample, len(logits_rows), position) for sample in item.sampled]
            logits_rows.append(end - 1)
    context_lens = [item.start + item.num_tokens for item in scheduled]
    return FlatStep(
        token_ids=tokens.ids,
        token_sources=tokens.sources,
        positions=tokens.positions,
        slots=tokens.slots,
        cu_seqlens_q=starts,
        context_lens=context_lens,
        seq_lens_q=[item.num_tokens for item in scheduled],
        block_tables=[
            item.seq.block_table[: -(-length // block_size)]
            for item, length in zip(scheduled, context_lens, strict=True)
        ],
        logits_rows=logits_rows,
        samples=samples,
        num_decodes=num_decodes,
        blends=[item.seq.blend for item in scheduled],
        row_blends=[item.seq.blend for item in scheduled if item.sampled],
    )
