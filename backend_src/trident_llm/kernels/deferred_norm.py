"""DeferredNorm: an RMSNorm whose rows are still to be scaled, by the linear layer that reads them.

A product is linear in its rows, so the factor 1 / rms of a row may come after it. The layer before writes the sum times
the norm's weight and what the squares in each of its programs add up to; the layer after finds the factor while its
weights are on their way, and no kernel stands between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 2


@dataclass(frozen=True)
class DeferredNorm:
    values: Tensor
    """[T, H]: rows times the norm's weight."""
    squares: Tensor
    """[T, P] float32: the squares of a row in P parts, without the weight."""
    eps: float

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def finish(self) -> Tensor:
        """The norm itself, [T, H]."""
        mean_square = self.squares.sum(-1, keepdim=True) / self.values.shape[1]
        return (self.values.float() * torch.rsqrt(mean_square + self.eps)).to(self.values.dtype)


def finished(x: Tensor | DeferredNorm) -> Tensor:
    """x, for who reads finished rows alone."""
    return x.finish() if isinstance(x, DeferredNorm) else x
