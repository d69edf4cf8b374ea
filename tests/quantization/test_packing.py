"""Codes survive packing, whatever their number, in the bytes that the format calls for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trident_llm.quantization.packing import pack, unpack


@given(
    bits=st.sampled_from([4, 5, 6, 8]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 67),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    count = rows * columns
    assert packed.numel() == (count if bits == 8 else -(-count // 2) + (bits - 4) * -(-count // 8))
    assert torch.equal(unpack(packed, bits, (rows, columns)), codes)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(4, [0x21, 0x0F]), (5, [0x21, 0x0F, 0b100]), (6, [0x21, 0x0F, 0b100, 0b110]), (8, [1, 2, 63])],
)
def test_bytes(bits, expected):
    codes = torch.tensor([1, 2, 63], dtype=torch.uint8)
    if bits != 8:
        codes[1] |= 32 if bits == 6 else 0
        codes &= 2**bits - 1
    assert pack(codes, bits).tolist() == expected
