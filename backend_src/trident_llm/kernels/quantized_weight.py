"""QuantizedWeight: a linear layer's weight as integers (or 8-bit floats) with scales.

What every quantization method and every quantized checkpoint produces, and what each device's kernels pack into their
own layout. Knows neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BITS = (4, 5, 6, 8)
"""Widths that the kernels read."""

Activations = Literal["none", "int8", "fp8"]
"""How the kernels bring x to 8 bits, a scale per token, before they multiply; none: x stays as it is."""


@dataclass(frozen=True)
class QuantizedWeight:
    """weight[o, i] = scales[o, g] * (codes[o, i] - zero_points[o, g]), g = i // group_size; [out, in] over all.

    With ``input_order`` the columns stand in another order: column i holds the weights of input input_order[i].
    """

    codes: Tensor
    """[out, in] uint8 from 0 to 2**bits - 1; float8_e4m3fn with fp8 activations, where no zero point counts."""
    scales: Tensor
    """[out, in / group_size], float16, bfloat16 or float32."""
    zero_points: Tensor
    """[out, in / group_size] uint8; 2**(bits - 1) throughout where the method is symmetric."""
    bits: int
    group_size: int
    """Inputs that share a scale and a zero point; the number of inputs where a whole row does."""
    activations: Activations = "none"
    input_order: Tensor | None = None
    """[in] int64, a permutation; only GPTQ checkpoints that others wrote have one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.codes.shape[0], self.codes.shape[1]

    def same_format(self, other: QuantizedWeight) -> bool:
        """Whether ``stack`` can put one above the other."""
        mine, others = self.input_order, other.input_order
        same_order = mine is others if mine is None or others is None else torch.equal(mine, others)
        names = ("bits", "group_size", "activations")
        return same_order and all(getattr(self, name) == getattr(other, name) for name in names)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that this stands for, columns in their own order; computed in float32."""
        num_outputs, num_inputs = self.shape
        groups = self.codes.float().view(num_outputs, -1, self.group_size)
        if self.activations != "fp8":
            groups = groups - self.zero_points.float()[..., None]
        weight = (groups * self.scales.float()[..., None]).view(num_outputs, num_inputs)
        if self.input_order is not None:
            weight = weight[:, torch.argsort(self.input_order)]
        return weight.to(dtype)


def scaled_rows(codes: Tensor, scales: Tensor, activations: Activations) -> QuantizedWeight:
    """A weight of 8-bit codes [out, in] for 8-bit activations: symmetric, with one of ``scales`` [out, 1] an output."""
    zero_points = torch.full_like(scales, 128, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zero_points, 8, codes.shape[1], activations)


def stack(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Weights of equal format with the same inputs, one above another (q, k and v; gate and up)."""
    first = parts[0]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat([part.zero_points for part in parts]),
        bits=first.bits,
        group_size=first.group_size,
        activations=first.activations,
        input_order=first.input_order,
    )
