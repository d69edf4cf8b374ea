"""SmoothQuant and FP8 against their formulas."""

from __future__ import annotations

import torch

from tests.quantization.layers import calibrated_layer
from trident_llm.quantization import fp8, smoothquant


def int8(values: torch.Tensor) -> torch.Tensor:
    scale = values.abs().amax(1, keepdim=True) / 127
    return (values / scale).round() * scale


def test_smoothquant_scales_are_the_best_alphas():
    layer = calibrated_layer()
    x, weight = layer.statistics.sample, layer.weight
    expected = x @ weight.T
    losses, candidates = [], []
    root_mean_square = x.square().mean(0).sqrt()
    for size in (root_mean_square, (root_mean_square * layer.x.abs().amax(0)).sqrt()):
        for step in range(5, 18):
            alpha = step / 20
            scales = size**alpha / weight.square().mean(0).sqrt() ** (1 - alpha)
            scales = scales / (scales.max() * scales.min()).sqrt()
            candidates.append(scales)
            losses.append((int8(x / scales) @ int8(weight * scales).T - expected).square().sum())
    found = smoothquant.search_scales(weight, layer.statistics)
    torch.testing.assert_close(found, candidates[int(torch.stack(losses).argmin())])
    assert min(losses) < 0.5 * (int8(x) @ int8(weight).T - expected).square().sum()


def test_smoothquant_keeps_scales_of_one_where_nothing_is_uneven():
    layer = calibrated_layer()
    generator = torch.Generator().manual_seed(0)
    even = torch.randint(0, 2, layer.weight.shape, generator=generator) * 2.0 - 1
    rows = torch.randint(0, 2, layer.statistics.sample.shape, generator=generator) * 2.0 - 1
    statistics = type(layer.statistics)(rows.abs().mean(0), rows.abs().amax(0), rows)
    assert torch.equal(smoothquant.search_scales(even, statistics), torch.ones(even.shape[1]))


def test_smoothquant_weights_are_symmetric_int8_by_output():
    weight = calibrated_layer().weight
    weight[3] = 0
    result = smoothquant.quantize(weight)
    assert (result.bits, result.group_size, result.activations) == (8, 128, "int8")
    assert (result.zero_points == 128).all() and result.codes.min() >= 1
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-14)
    torch.testing.assert_close(result.scales[:, 0], scales, rtol=1e-5, atol=1e-13)
    assert ((result.dequantize() - weight).abs() <= result.scales / 2 + 1e-8).all()


def test_int8_rows():
    x = calibrated_layer().x
    x[5] = 0
    rounded = smoothquant.to_int8_rows(x)
    assert torch.equal(rounded[5], x[5])
    torch.testing.assert_close(rounded[:5], int8(x[:5]))


def test_fp8_weights_are_e4m3_by_output():
    weight = calibrated_layer().weight
    weight[3] = 0
    result = fp8.quantize(weight)
    assert (result.codes.dtype, result.activations, result.group_size) == (torch.float8_e4m3fn, "fp8", 128)
    assert torch.equal(result.codes.float().abs().amax(1), torch.tensor([448.0] * 3 + [0.0] + [448.0] * 44))
    # e4m3 has three bits of mantissa down to 2**-6, and steps of 2**-9 below.
    bound = torch.maximum(weight.abs() / 16, result.scales * 2**-10)
    assert ((result.dequantize() - weight).abs() <= bound * 1.0001).all()


def test_fp8_rows_of_the_largest_numbers_are_no_nan():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 1e30
    assert fp8.to_fp8_rows(x).isfinite().all()
