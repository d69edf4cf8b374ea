"""FP8: weights and activations as 8-bit floats (e4m3), weights with a scale per output, activations one per token.

Needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight

_LIMIT = 448.0
"""The largest e4m3 number; torch makes larger ones NaN."""
_SMALLEST = 1e-12


def to_fp8_rows(values: Tensor) -> Tensor:
    """values [..., N] rounded to e4m3 with a scale per row, still float32: what fp8 operands stand for."""
    codes, scales = _encode(values)
    return codes.float() * scales


def quantize(weight: Tensor) -> QuantizedWeight:
    """weight: [out, in]."""
    codes, scales = _encode(weight)
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        zero_points=torch.full_like(scales, 128, dtype=torch.uint8),
        bits=8,
        group_size=weight.shape[1],
        activations="fp8",
    )


def _encode(values: Tensor) -> tuple[Tensor, Tensor]:
    scales = values.float().abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / _LIMIT
    return (values.float() / scales).clamp_(-_LIMIT, _LIMIT).to(torch.float8_e4m3fn), scales
