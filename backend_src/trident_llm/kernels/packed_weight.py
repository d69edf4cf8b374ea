"""PackedWeight: a quantized weight in the layout that the Triton-language kernels read.

A word of 16 bits holds the low four bits of four inputs that lie a chunk apart, so a row of words unpacks into four
runs of consecutive inputs with one shift and one logical operation per two weights, and the compiler brings the words
into the layout of the matrix instruction before they are unpacked. Bits above four lie in a second plane. Words that a
program reads together lie together: in panels of outputs, and in those block after block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized_weight import QuantizedWeight

NIBBLES = 4
"""Inputs per word of the first plane."""
PANEL = 64
"""Outputs whose words of a block lie together."""
_CHUNKS = (64, 32)
"""Inputs between two codes of a word; 64 makes a row of a block's words as long as a cache line."""


@dataclass(frozen=True)
class PackedWeight:
    """Inputs are padded to whole blocks of NIBBLES * chunk, with codes of 0 whose x must be taken as 0."""

    low: Tensor
    """[panels, blocks, PANEL, chunk] int16: bits 4j to 4j + 3 of word c of block b hold the low bits of the code of
    input (4b + j) * chunk + c. With 8 bits bits 8j to 8j + 7 of word c of block b hold that of input
    (2b + j) * chunk + c."""
    high: Tensor | None
    """5 and 6 bits: the bits above four, E = bits - 4 of them. [panels, ceil(blocks / P), PANEL, chunk] int16 with
    P = 4 / E blocks per word: bits E * (4p + j) and up of word c of block B belong to block B * P + p, nibble j."""
    scales_and_zeros: Tensor
    """[groups, out] int32: float16 scale in the low half, zero point in the high half."""
    bits: int
    num_outputs: int
    num_inputs: int
    group_size: int
    chunk: int
    """Inputs between two codes of a word."""
    input_order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    @property
    def nbytes(self) -> int:
        high = 0 if self.high is None else self.high.nbytes
        order = 0 if self.input_order is None else self.input_order.nbytes
        return self.low.nbytes + high + self.scales_and_zeros.nbytes + order


def pack(weight: QuantizedWeight) -> PackedWeight:
    """The same weight, packed; for activations "none". Groups are whole rows or multiples of 32."""
    num_outputs, num_inputs = weight.shape
    whole_rows = weight.group_size == num_inputs
    chunk = next((chunk for chunk in _CHUNKS if whole_rows or weight.group_size % chunk == 0), None)
    if chunk is None:
        raise ValueError(f"group_size is {weight.group_size}; the kernels read multiples of {_CHUNKS[-1]}, whole rows")
    per_word = 2 if weight.bits == 8 else NIBBLES
    codes = F.pad(weight.codes, (0, -num_inputs % (per_word * chunk), 0, -num_outputs % PANEL))
    codes = codes.view(codes.shape[0], -1, per_word, chunk)
    low = _words(codes, 8) if weight.bits == 8 else _words(codes & 15, 4)
    high = None
    if weight.bits in (5, 6):
        extra = weight.bits - 4
        planes = F.pad(codes >> 4, (0, 0, 0, 0, 0, -codes.shape[1] % (4 // extra)))
        high = _words(planes.reshape(codes.shape[0], -1, 4 // extra * NIBBLES, chunk), extra)
    scale_bits = weight.scales.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF
    return PackedWeight(
        low=low,
        high=high,
        scales_and_zeros=(scale_bits | (weight.zero_points.to(torch.int32) << 16)).t().contiguous(),
        bits=weight.bits,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        group_size=weight.group_size,
        chunk=chunk,
        input_order=weight.input_order,
    )


def _words(values: Tensor, width: int) -> Tensor:
    """values [out, blocks, n, chunk] of ``width`` bits, value j to bit width * j -> [panels, blocks, PANEL, chunk]."""
    words = torch.zeros(values.shape[0], values.shape[1], values.shape[3], dtype=torch.int32, device=values.device)
    for j in range(values.shape[2]):
        words |= values[:, :, j].to(torch.int32) << (width * j)
    return words.to(torch.int16).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
