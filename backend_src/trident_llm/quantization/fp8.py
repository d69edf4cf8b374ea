"""FP8: weights and activations as 8-bit floats (e4m3), weights with a scale per output, activations one per token.

Needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.layer_cache import SCALED_LIMITS
from ..kernels.quantized_weight import QuantizedWeight, scaled_rows

_LIMIT = SCALED_LIMITS[torch.float8_e4m3fn]
"""The largest e4m3 number; torch makes larger ones NaN."""
_SMALLEST = 1e-12


def to_fp8_rows(values: Tensor) -> Tensor:
    """values [..., N] rounded to e4m3 with a scale per row, still float32: what fp8 operands stand for."""
    codes, scales = _encode(values)
    return codes.float() * scales


def quantize(weight: Tensor) -> QuantizedWeight:
    """weight: [out, in]."""
    codes, scales = _encode(weight)
    return scaled_rows(codes, scales, "fp8")


def _encode(values: Tensor) -> tuple[Tensor, Tensor]:
    scales = values.float().abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / _LIMIT
    return (values.float() / scales).clamp_(-_LIMIT, _LIMIT).to(torch.float8_e4m3fn), scales
