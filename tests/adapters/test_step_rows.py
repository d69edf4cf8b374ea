"""A step's rows of adapters against what each row takes by itself."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from trident_llm.adapters.adapter import Adapter, Blend, BlendTerm
from trident_llm.adapters.step_rows import host_rows
from trident_llm.kernels.lora_layer import TILE_ROWS

NUM_SLOTS = 6


def blend(*terms: tuple[int, float | None]) -> Blend:
    """Of slots and weights."""
    adapters = [
        Adapter(f"a{slot}", slot, "", "", Path(), rank=4, num_modules=1, num_bytes=0, uses_dora=False, slot=slot)
        for slot, _ in terms
    ]
    pairs = zip(adapters, terms, strict=True)
    return Blend(tuple(BlendTerm(adapter, weight) for adapter, (_, weight) in pairs), str(terms))


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_single_sequences(seed: int) -> None:
    choose = random.Random(seed)
    kinds = [None, blend((1, 1.0)), blend((4, 0.5), (1, 0.25)), blend((0, None), (3, None)), blend((5, 1.0))]
    blends = [choose.choice(kinds) for _ in range(choose.randint(1, 30))]
    if seed % 2:
        blends.sort(key=kinds.index)
    lengths = [choose.choice([1, 1, 1, 2, TILE_ROWS, 3 * TILE_ROWS + 1]) for _ in blends]
    per_row = [entry for entry, length in zip(blends, lengths, strict=True) for _ in range(length)]

    rows = host_rows(blends, lengths, NUM_SLOTS)

    weights = np.zeros((len(per_row), NUM_SLOTS), dtype=np.float32)
    ran = {}
    for row, entry in enumerate(per_row):
        for term in entry.terms if entry else ():
            assert term.adapter.slot is not None
            weights[row, term.adapter.slot] = term.weight or 0.0
            ran[row, term.adapter.slot] = term.weight
    np.testing.assert_array_equal(rows.weights, weights)
    assert ran == {(row, run.slot): run.weight for run in rows.runs for row in range(run.start, run.end)}
    assert sum(run.end - run.start for run in rows.runs) == len(ran)
    assert len(rows.tile_slots) == 1 + -(-len(per_row) // TILE_ROWS)
    for tile, slots in enumerate(rows.tile_slots[1:]):
        own = {slot for row, slot in ran if row // TILE_ROWS == tile}
        assert set(slots[: len(own)]) == own and (slots[len(own) :] == -1).all()
    used = {slot for _, slot in ran}
    assert rows.tile_slots[0].tolist() == [slot if slot in used else -1 for slot in range(NUM_SLOTS)]


def test_equal_requests_in_a_row_are_one_run() -> None:
    rows = host_rows([None, blend((2, 1.0)), blend((2, 1.0)), blend((2, 0.5))], [3, 1, 4, 1], NUM_SLOTS)
    assert [(run.slot, run.start, run.end, run.weight) for run in rows.runs] == [(2, 3, 8, 1.0), (2, 8, 9, 0.5)]
