"""RTN: every weight is rounded to the nearest point of its group's grid, whose range is the one of least squared error.

Needs no calibration.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from .grid import round_to_grids


def quantize(weight: Tensor, *, bits: int, group_size: int, symmetric: bool) -> QuantizedWeight:
    """weight: [out, in], group_size divides in."""
    return round_to_grids(weight, bits=bits, group_size=group_size, symmetric=symmetric)
