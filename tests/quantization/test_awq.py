"""AWQ against a search written out with the activations themselves."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.layers import calibrated_layer
from trident_llm.quantization import awq, rtn


def min_max_rounded(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.view(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    return (((groups / scale + zero).round().clamp(0, 15) - zero) * scale).view_as(weight)


def test_scales_are_the_best_power_of_the_mean_activation():
    layer = calibrated_layer()
    mean = layer.x.abs().mean(0)
    losses, candidates = [], []
    for step in range(20):
        scales = mean ** (step / 20)
        scales = scales / (scales.max() * scales.min()).sqrt()
        candidates.append(scales)
        losses.append(layer.output_error(min_max_rounded(layer.weight * scales, 32) / scales))
    best = int(torch.tensor(losses).argmin())
    assert best > 0
    found = awq.search_scales(layer.weight, layer.statistics, bits=4, group_size=32, symmetric=False)
    torch.testing.assert_close(found, candidates[best])


def test_scaling_and_clipping_each_bring_the_output_nearer():
    layer = calibrated_layer()
    options = {"bits": 4, "group_size": 32, "symmetric": False}
    rounded = layer.output_error(rtn.quantize(layer.weight, **options).dequantize())
    clipped = layer.output_error(awq.quantize(layer.weight, layer.statistics, **options).dequantize())
    scales = awq.search_scales(layer.weight, layer.statistics, **options)
    both = awq.quantize(layer.weight * scales, layer.statistics.divided_by(scales), **options).dequantize() / scales
    assert clipped < 0.95 * rounded
    assert layer.output_error(both) < 0.8 * clipped


@pytest.mark.parametrize("group", [0, 2])
def test_a_groups_range_has_the_least_error_in_its_part_of_the_output(group):
    layer = calibrated_layer(num_outputs=6)
    columns = slice(group * 32, group * 32 + 32)
    x, weight = layer.x[:, columns], layer.weight[:, columns]
    result = awq.quantize(layer.weight, layer.statistics, bits=4, group_size=32, symmetric=False).dequantize()
    error = (x @ (result[:, columns] - weight).T).square().mean(0)
    for shrink in torch.linspace(1, 0.5, 16).tolist():
        low, high = weight.amin(1, keepdim=True) * shrink, weight.amax(1, keepdim=True) * shrink
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round().clamp(0, 15)
        other = ((weight / scale + zero).round().clamp(0, 15) - zero) * scale
        assert (error <= (x @ (other - weight).T).square().mean(0) * 1.0001 + 1e-7).all()
