"""RTN: every weight is rounded to the nearest point of its group's grid, whose range is the one of least squared error.

Needs no calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from .grid import as_groups, concatenate, quantized, row_chunks, scale_dtype, search_grid


def quantize(weight: Tensor, *, bits: int, group_size: int, symmetric: bool) -> QuantizedWeight:
    """weight: [out, in], group_size divides in."""
    dtype = scale_dtype(weight, group_size, bits)
    codes, grids = [], []
    for rows in row_chunks(weight):
        groups = as_groups(weight[rows], group_size)
        grid = search_grid(groups, bits, symmetric=symmetric, dtype=dtype)
        codes.append(grid.encode(groups).to(torch.uint8))
        grids.append(grid)
    return quantized(torch.cat(codes), concatenate(grids), group_size, dtype)
