"""A step's adapters as the kernels want them: which rows take how much of which slot. Still on the host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.lora_layer import TILE_ROWS, LoraRows, SlotRun, num_tiles
from .adapter import Blend
from .mix import MixUse


@dataclass(frozen=True)
class HostRows:
    """See ``LoraRows``; M is 1."""

    weights: NDArray[np.float32]
    """[N, S]; 0 where they are found per token."""
    tile_slots: NDArray[np.int32]
    """[1 + ceil(N / TILE_ROWS), S]."""
    runs: tuple[SlotRun, ...]

    def to_rows(self) -> LoraRows:
        return LoraRows(torch.from_numpy(self.weights)[None], torch.from_numpy(self.tile_slots), self.runs)


def host_rows(blends: Sequence[Blend | MixUse | None], lengths: Sequence[int], num_slots: int) -> HostRows:
    """``lengths[i]`` rows, one after another, take ``blends[i]``. All adapters have slots."""
    num_rows = sum(lengths)
    weights = np.zeros((num_rows, num_slots), dtype=np.float32)
    tiles: list[dict[int, None]] = [{} for _ in range(num_tiles(num_rows))]
    runs: list[SlotRun] = []
    open_runs: dict[tuple[int, float | None], int] = {}
    for blend, start, end in _stretches(blends, lengths):
        for term in blend.terms:
            slot = term.adapter.slot
            assert slot is not None, f"{term.adapter.name} has no slot"
            weights[start:end, slot] = term.weight or 0.0
            for tile in range(start // TILE_ROWS, num_tiles(end)):
                tiles[tile][slot] = None
            index = open_runs.get((slot, term.weight))
            if index is not None and runs[index].end == start:
                runs[index] = SlotRun(slot, runs[index].start, end, term.weight)
            else:
                open_runs[slot, term.weight] = len(runs)
                runs.append(SlotRun(slot, start, end, term.weight))
    tile_slots = np.full((1 + len(tiles), num_slots), -1, dtype=np.int32)
    for row, slots in zip(tile_slots[1:], tiles, strict=True):
        row[: len(slots)] = list(slots)
        tile_slots[0, row[: len(slots)]] = row[: len(slots)]
    return HostRows(weights, tile_slots, tuple(runs))


def _stretches(
    blends: Sequence[Blend | MixUse | None], lengths: Sequence[int]
) -> Iterator[tuple[Blend | MixUse, int, int]]:
    """Adjoining rows that take the same, with their first row and the one after their last."""
    end = 0
    for blend, group in itertools.groupby(zip(blends, lengths, strict=True), key=lambda pair: pair[0]):
        start, end = end, end + sum(length for _, length in group)
        if blend is not None:
            yield blend, start, end
