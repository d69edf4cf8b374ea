"""Runs given tokens through a loaded decoder, in chunks that read the keys before them from the paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trident_llm.engine.batch import AttentionMetadata, ModelInput
from trident_llm.engine.kv_cache import KVCache
from trident_llm.engine.loading import LoadedModel, choose_kv_cache_dtype


@dataclass(frozen=True)
class Chunk:
    """Some positions of a sequence, on the model's device."""

    hidden: Tensor
    """[C, H]: what the head reads."""
    logits: Tensor
    """[C, vocab] float32."""
    following: Tensor
    """[C] int64: the tokens that really follow."""

    @property
    def logprobs(self) -> Tensor:
        """[C]: of the tokens that follow."""
        return torch.log_softmax(self.logits, -1).gather(1, self.following[:, None]).flatten()


class TeacherForced:
    """Takes one sequence of at most ``length`` tokens at a time, ``chunk`` tokens a step."""

    def __init__(self, model: LoadedModel, kv_cache_dtype: str, length: int, chunk: int) -> None:
        self._decoder = model.decoder
        self._device = model.device
        self._chunk = chunk
        block_size = model.kv_cache.block_size
        self._cache = KVCache(
            model.config,
            num_blocks=-(-length // block_size),
            block_size=block_size,
            dtype=choose_kv_cache_dtype(kv_cache_dtype, model.dtype, model.device),
            device=model.device,
        )

    def chunks(self, tokens: list[int]) -> Iterator[Chunk]:
        """All positions of a sequence that have a next token, in order."""
        for start in range(0, len(tokens) - 1, self._chunk):
            end = min(start + self._chunk, len(tokens) - 1)
            hidden = self._decoder.hidden_states(self._model_input(tokens, start, end), self._cache)
            following = self._tensor(tokens[start + 1 : end + 1], torch.int64)
            yield Chunk(hidden, self._decoder.head(hidden).float(), following)

    def _model_input(self, tokens: list[int], start: int, end: int) -> ModelInput:
        """Positions ``start`` to ``end`` of a sequence whose blocks follow each other."""
        size, count = self._cache.block_size, end - start
        positions = torch.arange(start, end, device=self._device)
        num_decodes = int(count == 1)
        attention = AttentionMetadata(
            slot_mapping=positions,
            block_tables=torch.arange(-(-end // size), dtype=torch.int32, device=self._device)[None],
            cu_seqlens_q=self._tensor([0, count], torch.int32),
            context_lens=self._tensor([end], torch.int32),
            seq_lens_q=(count,),
            context_lens_host=(end,),
            seq_counts=self._tensor([num_decodes, 1], torch.int32),
            num_decodes=num_decodes,
            num_prefills=1 - num_decodes,
            block_size=size,
        )
        return ModelInput(self._tensor(tokens[start:end], torch.int64), positions, positions - start, attention)

    def _tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
