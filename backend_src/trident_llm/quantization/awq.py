"""AWQ (Lin et al. 2023): inputs that are large on average get finer steps, then ranges are clipped for the output.

A weight is multiplied by a scale per input before it is rounded, and the input divided by it in the operation before.
Losses are those of the linear layer's own output; with the Hessian they are exact and need no activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from .grid import as_groups, grid_of_range, round_to_grids, row_chunks
from .statistics import InputStatistics

_NUM_RATIOS = 20


def search_scales(
    weight: Tensor, statistics: InputStatistics, *, bits: int, group_size: int, symmetric: bool
) -> Tensor:
    """The scales [in] of least output error among mean(abs(x)) ** ratio, ratio from 0 to below 1."""
    weight = weight.float()
    magnitudes = statistics.mean_abs.clamp(min=1e-6)
    best = torch.ones_like(magnitudes)
    least = torch.full((), torch.inf, device=weight.device)
    for step in range(_NUM_RATIOS):
        scales = magnitudes ** (step / _NUM_RATIOS)
        scales = (scales / (scales.amax() * scales.amin()).sqrt()).clamp(1e-4, 1e4)
        loss = statistics.output_error(_rounding_error(weight, scales, bits, group_size, symmetric))
        best = torch.where(loss < least, scales, best)
        least = torch.minimum(loss, least)
    return best


def _rounding_error(weight: Tensor, scales: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """What rounding weight * scales changes in the weight, [out, in]."""
    error = torch.empty_like(weight)
    for rows in row_chunks(weight):
        groups = as_groups(weight[rows] * scales, group_size)
        grid = grid_of_range(groups.amin(-1), groups.amax(-1), bits, symmetric=symmetric, dtype=torch.float32)
        difference = grid.decode(grid.encode(groups)).sub_(groups)
        error[rows] = difference.view(error[rows].shape).div_(scales)
    return error


def quantize(
    weight: Tensor, statistics: InputStatistics, *, bits: int, group_size: int, symmetric: bool
) -> QuantizedWeight:
    """weight [out, in], already scaled, with the statistics of what it then reads (Hessian included).

    Ranges are clipped for the least error in each group's part of the output.
    """
    assert statistics.hessian is not None
    num_groups = weight.shape[1] // group_size
    blocks = statistics.hessian.view(num_groups, group_size, num_groups, group_size)
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def error(difference: Tensor) -> Tensor:
        by_group = difference.transpose(0, 1)
        return (torch.bmm(by_group, blocks) * by_group).sum(-1).T

    return round_to_grids(weight, bits=bits, group_size=group_size, symmetric=symmetric, error=error)
