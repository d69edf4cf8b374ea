"""GPTQ (Frantar et al. 2022): columns are rounded one after another, and each error is made up for by those to come.

Columns go in the order of their inputs' energy (act-order), but scales belong to groups of neighbouring inputs and
are chosen before anything is rounded: what comes out needs no permutation when it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from .grid import Grid, as_groups, concatenate, quantized, row_chunks, scale_dtype, search_grid
from .statistics import InputStatistics

_BLOCK = 128
"""Columns after whose rounding the error is carried over to all later ones."""
_DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to the diagonal; ten times as much until it can be factored."""


def quantize(
    weight: Tensor, statistics: InputStatistics, *, bits: int, group_size: int, symmetric: bool
) -> QuantizedWeight:
    """weight: [out, in], group_size divides in. The statistics need the Hessian."""
    assert statistics.hessian is not None
    energy = statistics.hessian.diagonal()
    dtype = scale_dtype(weight, group_size, bits)
    grid = _static_grid(weight, energy, bits, group_size, symmetric, dtype)
    order = energy.argsort(descending=True)
    factor = inverse_factor(statistics.hessian[order][:, order])
    codes = torch.empty_like(weight, dtype=torch.uint8)
    codes[:, order] = _round_columns(weight.float()[:, order].T, factor, grid, order // group_size).T
    return quantized(codes, grid, group_size, dtype)


def _static_grid(
    weight: Tensor, energy: Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """Ranges by squared error, each input counted by its energy [in]."""
    importance = energy.view(-1, group_size)
    grids = []
    for rows in row_chunks(weight):
        groups = as_groups(weight[rows], group_size)
        grids.append(
            search_grid(
                groups, bits, symmetric=symmetric, dtype=dtype, error=lambda d: d.square_().mul_(importance).sum(-1)
            )
        )
    return concatenate(grids)


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = inverse of the damped Hessian [in, in]; float32.

    The reversed matrix is factored, J H J = L L^T: then R = J L J is upper triangular with R R^T = H, and U = R^-1.
    That takes one Cholesky factorization and one triangular solve, and no inverse of H itself.
    """
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = _DAMPING
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(mean * damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.item():
            break
        damping *= 10
    identity = torch.eye(hessian.shape[0], device=hessian.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def _round_columns(columns: Tensor, factor: Tensor, grid: Grid, groups: Tensor) -> Tensor:
    """Codes [in, out] uint8 of a transposed weight [in, out] in the order of rounding, which is overwritten.

    groups: [in], the group of each column.
    """
    scales, zero_points, largest = grid.scales.T, grid.zero_points.T, 2**grid.bits - 1
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for start in range(0, columns.shape[0], _BLOCK):
        block = slice(start, min(start + _BLOCK, columns.shape[0]))
        values, triangle = columns[block].contiguous(), factor[block, block]
        pivots = triangle.diagonal().reciprocal()
        block_scales, block_zeros = scales[groups[block]], zero_points[groups[block]]
        rounded, errors = torch.empty_like(values), torch.empty_like(values)
        for i in range(values.shape[0]):
            scale, zero = block_scales[i], block_zeros[i]
            code = torch.div(values[i], scale, out=rounded[i]).add_(zero).round_().clamp_(0, largest)
            error = torch.sub(code, zero, out=errors[i]).mul_(scale).sub_(values[i]).mul_(pivots[i])
            # The error has its sign turned: it is added.
            values[i + 1 :].addr_(triangle[i, i + 1 :], error)
        codes[block] = rounded.to(torch.uint8)
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors)
    return codes
