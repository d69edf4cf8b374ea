"""DoRA's factors (Liu et al. 2024), from the base weight as the model multiplies by it, packed or quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.layers import AdaptableLinear, Linear

_CHUNK = 512
"""Columns of the weight at a time."""


@torch.inference_mode()
def dora_gains(linear: AdaptableLinear, a: Tensor, b: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """[out] float32 on the host: m / ||W + B A|| - 1 by row; 0 where there is no magnitude (NaN).

    a: [P, r, in], b: [out, r] with the scale included, magnitudes: [out]; float32 on the model's device. The columns of
    W come from products with unit vectors: there need not be a plain copy of it. Exact, as such products round nothing.
    """
    device, num_inputs = a.device, linear.num_inputs
    sizes = list(linear.parts.values())
    squares = torch.zeros(len(b), dtype=torch.float32, device=device)
    for first in range(0, num_inputs, _CHUNK):
        columns = slice(first, min(first + _CHUNK, num_inputs))
        units = torch.zeros(columns.stop - first, num_inputs, dtype=dtype, device=device)
        units[torch.arange(len(units), device=device), torch.arange(first, columns.stop, device=device)] = 1
        weight = _unscaled(linear.linear, linear.linear.product(units).float(), columns)
        update = torch.cat([part_b @ part_a[:, columns] for part_b, part_a in zip(b.split(sizes), a, strict=True)])
        squares += (weight.t() + update).square_().sum(1)
    gains = magnitudes / squares.sqrt() - 1
    return torch.where(magnitudes.isnan(), 0.0, gains).cpu()


def _unscaled(linear: Linear, weight: Tensor, columns: slice) -> Tensor:
    """Columns of a weight, [columns, out], without what quantization folded into it."""
    if linear.input_scales is not None:
        weight = weight / linear.input_scales[columns, None]
    return weight if linear.output_scales is None else weight * linear.output_scales
