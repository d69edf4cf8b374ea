"""Small layers with uneven inputs, as language models have them, for tests of quantization methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trident_llm.quantization.statistics import Gatherer, InputStatistics


@dataclass(frozen=True)
class CalibratedLayer:
    weight: Tensor
    """[out, in]"""
    x: Tensor
    """[rows, in]: what it reads."""
    statistics: InputStatistics

    def output_error(self, weight: Tensor) -> float:
        """Mean squared error of the output with another weight, summed over outputs."""
        return (self.x @ (weight - self.weight).T).square().sum(1).mean().item()


def calibrated_layer(
    num_outputs: int = 48, num_inputs: int = 128, num_rows: int = 700, seed: int = 0
) -> CalibratedLayer:
    """Correlated inputs, a few of them much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    sizes = torch.exp(torch.randn(num_inputs, generator=generator))
    sizes[torch.randperm(num_inputs, generator=generator)[:4]] *= 10
    x = torch.randn(num_rows, num_inputs, generator=generator) @ (mix + torch.eye(num_inputs)) * sizes
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05
    gatherer = Gatherer(num_inputs, num_rows, x.device, hessian=True)
    for part in x.split(256):
        gatherer.add(part)
    return CalibratedLayer(weight, x, gatherer.result())
