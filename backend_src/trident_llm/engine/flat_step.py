"""FlatStep: a scheduled step as arrays on one token axis, still on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .scheduler import SchedulerOutput
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

    token_ids: list[int]
    token_sources: list[int]
    """[T]: where a token that the host does not know yet lies among the previous step's samples; else -1."""
    positions: list[int]
    slots: list[int]
    cu_seqlens_q: list[int]
    context_lens: list[int]
    seq_lens_q: list[int]
    block_tables: list[list[int]]
    """Blocks beyond the context (reserved for later chunks) are left out: they would only widen the table. Where a
    sliding window has passed, RELEASED stands; attention never reads these entries."""
    logits_rows: list[int]
    samples: list[Sample]
    num_decodes: int
    uses_sources: bool

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_q)

    @property
    def table_width(self) -> int:
        return max(map(len, self.block_tables))


def flatten(output: SchedulerOutput, block_size: int, sampled_before: Mapping[Sequence, int]) -> FlatStep:
    """``sampled_before`` holds the sequences that the previous step sampled, with their index there."""
    token_ids: list[int] = []
    sources: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    logits_rows: list[int] = []
    samples: list[Sample] = []
    uses_sources = False
    for item in output.scheduled:
        seq, start, end = item.seq, item.start, item.start + item.num_tokens
        known = seq.token_ids[start:end]
        token_ids += known
        sources += [-1] * len(known)
        if len(known) < item.num_tokens:
            # At most the last token is unknown: nothing is scheduled beyond a token that was never sampled.
            token_ids.append(0)
            sources.append(sampled_before[seq])
            uses_sources = True
        positions += range(start, end)
        for index in range(start // block_size, -(-end // block_size)):
            first = seq.block_table[index] * block_size - index * block_size
            slots += range(first + max(start, index * block_size), first + min(end, (index + 1) * block_size))
        starts.append(starts[-1] + item.num_tokens)
        if item.sampled:
            samples += (Sample(sample, len(logits_rows), end) for sample in item.sampled)
            logits_rows.append(starts[-1] - 1)
    context_lens = [item.start + item.num_tokens for item in output.scheduled]
    return FlatStep(
        token_ids=token_ids,
        token_sources=sources,
        positions=positions,
        slots=slots,
        cu_seqlens_q=starts,
        context_lens=context_lens,
        seq_lens_q=[item.num_tokens for item in output.scheduled],
        block_tables=[
            item.seq.block_table[: -(-length // block_size)]
            for item, length in zip(output.scheduled, context_lens, strict=True)
        ],
        logits_rows=logits_rows,
        samples=samples,
        num_decodes=sum(item.num_tokens == 1 for item in output.scheduled),
        uses_sources=uses_sources,
    )
