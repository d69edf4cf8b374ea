"""PackedBytes: a weight of 8-bit numbers for products with 8-bit activations, in the layout of the kernels.

Columns stand in blocks of 128, within which those of the first and the second half alternate; the activations are
brought into the same order when they are quantized. Two neighbouring bytes are then a word as in ``PackedWeight``, so
the kernel for very few rows reads this layout too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_weight import PackedWeight, pack
from .quantized_weight import QuantizedWeight

BLOCK = 128


@dataclass(frozen=True)
class PackedBytes:
    codes: Tensor
    """[out, in padded to whole blocks] int8 or float8_e4m3fn, columns in the order above; zeros beyond the last."""
    scales: Tensor
    """[out] float32."""
    num_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.num_inputs

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def pack_quantized(weight: QuantizedWeight) -> PackedWeight | PackedBytes:
    """In the layout for products with 8-bit activations where there is one for it.

    That has no zero points: a weight with some is packed for activations as they are, which loses nothing.
    """
    if weight.activations == "none":
        return pack(weight)
    if weight.activations == "int8" and bool((weight.zero_points != 128).any()):
        return pack(replace(weight, activations="none"))
    return pack_bytes(weight)


def pack_bytes(weight: QuantizedWeight) -> PackedBytes:
    """The same weight, packed; for activations "int8" and "fp8", with a scale per output and no zero points."""
    num_outputs, num_inputs = weight.shape
    codes = weight.codes if weight.activations == "fp8" else (weight.codes.to(torch.int16) - 128).to(torch.int8)
    padded = F.pad(codes.view(torch.uint8), (0, -num_inputs % BLOCK))
    alternating = padded.view(num_outputs, -1, 2, BLOCK // 2).transpose(2, 3).reshape(num_outputs, -1)
    return PackedBytes(alternating.view(codes.dtype), weight.scales.float().flatten().contiguous(), num_inputs)
