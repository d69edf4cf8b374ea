"""PagedSteps: block tables and model inputs for sequences that share a pool, without scheduler or block manager."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from trident_llm.engine.batch import AttentionMetadata, ModelInput


@dataclass(frozen=True)
class Chunk:
    """``num_tokens`` tokens of sequence ``seq`` from position ``start`` on."""

    seq: int
    start: int
    num_tokens: int
    stored: bool = True
    """False: the tokens get slot -1."""


class PagedSteps:
    """Every sequence owns shuffled blocks for ``max_len`` tokens; a step is a list of chunks, decodes first."""

    def __init__(
        self, num_seqs: int, *, max_len: int, block_size: int, spare_blocks: int = 3, device: str = "cpu"
    ) -> None:
        blocks = -(-max_len // block_size)
        self.block_size = block_size
        self.num_blocks = num_seqs * blocks + spare_blocks
        self.device = device
        ids = list(range(self.num_blocks))
        random.Random(0).shuffle(ids)
        self.block_tables = [ids[i * blocks : (i + 1) * blocks] for i in range(num_seqs)]

    def slots(self, seq: int, start: int, end: int) -> list[int]:
        """Cache slots of positions start .. end - 1 of a sequence."""
        size, table = self.block_size, self.block_tables[seq]
        return [table[p // size] * size + p % size for p in range(start, end)]

    def metadata(self, chunks: list[Chunk]) -> AttentionMetadata:
        """The step's metadata; each table is cut to the blocks its context needs, as the model runner does."""
        slots: list[int] = []
        starts = [0]
        tables = []
        for chunk in chunks:
            end = chunk.start + chunk.num_tokens
            slots += self.slots(chunk.seq, chunk.start, end) if chunk.stored else [-1] * chunk.num_tokens
            starts.append(starts[-1] + chunk.num_tokens)
            tables.append(self.block_tables[chunk.seq][: -(-end // self.block_size)])
        width = max(map(len, tables))
        num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
        context_lens = tuple(chunk.start + chunk.num_tokens for chunk in chunks)
        return AttentionMetadata(
            slot_mapping=self._tensor(slots, torch.int64),
            block_tables=self._tensor([table + [0] * (width - len(table)) for table in tables], torch.int32),
            cu_seqlens_q=self._tensor(starts, torch.int32),
            context_lens=self._tensor(context_lens, torch.int32),
            seq_lens_q=tuple(chunk.num_tokens for chunk in chunks),
            context_lens_host=context_lens,
            seq_counts=self._tensor([num_decodes, len(chunks)], torch.int32),
            num_decodes=num_decodes,
            num_prefills=len(chunks) - num_decodes,
            block_size=self.block_size,
        )

    def model_input(self, token_ids: list[list[int]], chunks: list[Chunk]) -> ModelInput:
        """``token_ids``: all tokens of each sequence. Logits are wanted for every token of the step."""
        flat = [t for c in chunks for t in token_ids[c.seq][c.start : c.start + c.num_tokens]]
        positions = [p for c in chunks for p in range(c.start, c.start + c.num_tokens)]
        return ModelInput(
            token_ids=self._tensor(flat, torch.int64),
            positions=self._tensor(positions, torch.int64),
            logits_rows=torch.arange(len(flat), device=self.device),
            attention=self.metadata(chunks),
        )

    def _tensor(self, values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
