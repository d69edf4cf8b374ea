"""Integer grids for groups of weights: the scale and zero point of a range, rounding, and the search for a range.

Groups are [out, G, group_size] float32, with one scale and one zero point for each of the [out, G].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight

_SMALLEST_HALF = 2.0**-18
"""Below it float16's steps are more than 1.6% of a scale. Codes are chosen for scales as they are stored, so a coarse
one is merely a range that is not quite the best."""
_LARGEST_HALF = 65504.0
_CHUNK_ELEMENTS = {"cpu": 1 << 16}
"""Weights that are worked on at once. Larger pieces leave a CPU's cache, and their memory comes from the kernel anew
each time: 0.1 ns an element and operation become 1 to 2."""
_MANY_ELEMENTS = 1 << 26
_SMALLEST_SHRINK = {4: 0.5, 5: 0.6, 6: 0.7, 8: 0.85}
"""The tightest range that is tried, as a share of the whole one, by bits."""
_NUM_SHRINKS = {4: 16, 5: 12, 6: 10, 8: 6}


@dataclass(frozen=True)
class Grid:
    """value = scales * (code - zero_points), with codes from 0 to 2**bits - 1."""

    scales: Tensor
    """[out, G] float32, of values that ``scale_dtype`` holds exactly."""
    zero_points: Tensor
    """[out, G] float32, whole numbers."""
    bits: int

    def places(self, groups: Tensor) -> Tensor:
        """Where values lie between the codes."""
        return (groups / self.scales[..., None]).add_(self.zero_points[..., None])

    def nearest(self, places: Tensor) -> Tensor:
        """The nearest codes, as float32."""
        return places.round().clamp_(0, 2**self.bits - 1)

    def encode(self, groups: Tensor) -> Tensor:
        return self.nearest(self.places(groups))

    def decode(self, codes: Tensor) -> Tensor:
        return codes.sub(self.zero_points[..., None]).mul_(self.scales[..., None])


Error = Callable[[Tensor], Tensor]
"""From differences [out, G, group_size] between groups and what they are rounded to, to a loss of each group [out, G].
It is quadratic: twice the difference, four times the loss."""


def squared_error(difference: Tensor) -> Tensor:
    return difference.square_().sum(-1)


def as_groups(weight: Tensor, group_size: int) -> Tensor:
    """weight [out, in] -> [out, in / group_size, group_size] float32."""
    return weight.float().view(weight.shape[0], -1, group_size)


def scale_dtype(weight: Tensor, group_size: int, bits: int) -> torch.dtype:
    """float16, or float32 for a weight whose smallest or largest scales do not fit."""
    ranges = as_groups(weight, group_size).abs().amax(-1)
    scales = ranges * (_SMALLEST_SHRINK[bits] / (2**bits - 1))
    held = (scales == 0) | ((scales >= _SMALLEST_HALF) & (ranges <= _LARGEST_HALF))
    return torch.float16 if bool(held.all()) else torch.float32


def grid_of_range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid from ``low`` to ``high`` [out, G], widened to hold 0. Symmetric: 0 is the code 2**(bits - 1)."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scales = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        scales = (high - low) / (2**bits - 1)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales)).to(dtype).float()
    if symmetric:
        return Grid(scales, torch.full_like(scales, 2 ** (bits - 1)), bits)
    return Grid(scales, (-low / scales).round_().clamp_(0, 2**bits - 1), bits)


def search_grid(
    groups: Tensor, bits: int, *, symmetric: bool, dtype: torch.dtype, error: Error = squared_error
) -> Grid:
    """The grid with the least ``error`` among those of each group's whole range and of parts of it.

    Clipping the few largest weights of a group makes the steps of all others smaller.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    best: Grid | None = None
    for shrink in torch.linspace(1.0, _SMALLEST_SHRINK[bits], _NUM_SHRINKS[bits]).tolist():
        grid = grid_of_range(low * shrink, high * shrink, bits, symmetric=symmetric, dtype=dtype)
        places = grid.places(groups)
        loss = error(grid.nearest(places).sub_(places)) * grid.scales.square()
        if best is None:
            best, least = grid, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zero_points, best.zero_points),
            bits,
        )
    assert best is not None
    return best


def round_to_grids(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool, error: Error = squared_error
) -> QuantizedWeight:
    """weight [out, in] rounded to the nearest points of its groups' grids, found by ``search_grid``."""
    dtype = scale_dtype(weight, group_size, bits)
    codes, grids = [], []
    for rows in row_chunks(weight):
        groups = as_groups(weight[rows], group_size)
        grid = search_grid(groups, bits, symmetric=symmetric, dtype=dtype, error=error)
        codes.append(grid.encode(groups).to(torch.uint8))
        grids.append(grid)
    return quantized(torch.cat(codes), concatenate(grids), group_size, dtype)


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of a weight's rows of which each is worked on at once."""
    elements = _CHUNK_ELEMENTS.get(weight.device.type, _MANY_ELEMENTS)
    rows = max(elements // weight.shape[1], 1)
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def quantized(codes: Tensor, grid: Grid, group_size: int, dtype: torch.dtype) -> QuantizedWeight:
    """codes: [out, in] or in groups, whole numbers of any dtype; dtype: of the scales."""
    return QuantizedWeight(
        codes=codes.reshape(codes.shape[0], -1).to(torch.uint8),
        scales=grid.scales.to(dtype),
        zero_points=grid.zero_points.to(torch.uint8),
        bits=grid.bits,
        group_size=group_size,
    )


def concatenate(grids: list[Grid]) -> Grid:
    """Grids of rows above one another."""
    return Grid(
        torch.cat([grid.scales for grid in grids]), torch.cat([grid.zero_points for grid in grids]), grids[0].bits
    )
